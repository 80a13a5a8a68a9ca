#!/bin/bash
#SBATCH --job-name=imagenet64
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=4:00:00
#SBATCH --partition=batch
#SBATCH --account=diffusion
#SBATCH --qos=normal
#SBATCH --constraint=h100
#SBATCH --signal=B:USR1@300
#SBATCH --output=/runs/imagenet64/launch/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

# imagenet64: 64 nodes x 8 ranks, from the code and the preset in /runs/imagenet64.
run=/runs/imagenet64
# The plain number of an array's last task is the whole array's.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}
told=
trap leave USR1
trap : TERM  # the ranks save; this shell stays to say what became of them

say() {
  printf '%s  job %s start %s: %s\n' "$(date '+%F %T')" "$job" "$start" "$*" |
    tee -a "$run/launch/events.txt"
}

newest() {
  newest=$(ls "$run/checkpoints" 2> /dev/null | grep -Ex '[0-9]{12}' | tail -n 1)
  echo "${newest:-none}"
}

# Whatever the controller is asked, it may be busy or starting again: insist for five minutes.
insist() {
  for pause in 5 10 15 30 60 60 60 60; do
    "$@" && return
    sleep $pause
  done
  "$@"
}

# A cancelled job stays so, and a shell whose node Slurm gave up must not touch the next start.
# Without progress since the last time that a start did not save, another one would not help.
again() {
  case $(insist scontrol show job -o "$job") in
    *" JobState=RUNNING "*" Restarts=$start "*)
      if [ "$1" != saved ]; then
        if [ "$(cat "$run/launch/failed-at" 2> /dev/null)" = "$(newest)" ]; then
          say "$1, for the second time at checkpoint $(newest): not started again"
          return
        fi
        newest > "$run/launch/failed-at"
      fi
      say "$1; goes on from checkpoint $(newest)"
      insist scontrol requeue "$job" || say "scontrol does not answer: start the run again" ;;
    "") say "$1; scontrol does not answer: start the run again" ;;
    *) say "$1; cancelled, or already started again" ;;
  esac
}

leave() {
  told=yes
  scancel --signal=USR1 "$job"
  # Beyond the time limit Slurm would not start the job again.
  { sleep 270; again "did not leave in 270 s"; } &
  timer=$!
}

cd /home/me/adm
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1

say "begins on $SLURM_JOB_NODELIST at checkpoint $(newest)"
srun \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  --container-image=/scratch/images/adm.sqsh \
  --container-mounts=/scratch:/scratch,/home/me:/home/me \
  --container-workdir=/home/me/adm \
  python3 -m trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
  --patience 600 \
  --set 'training.lr = 1e-4' \
  --set 'training.precision = "bf16"' &
ranks=$!
wait "$ranks"
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; done  # a signal ended the wait before
wait "$ranks"
status=$?
[ -z "$told" ] || kill "$timer" 2> /dev/null

case $status in
  0)  # also what srun says when Slurm has given the job's node up
    case $(tail -n 1 "$run/log.txt") in
      *finished*) say "finished" ;;
      *"asked to stop"*) say "stopped as asked" ;;
      *) again "srun ended in mid-run" ;;
    esac ;;
  78) say "refused for the reason above; not started again" ;;
  75) if [ -e "$run/launch/stop" ]; then say "stopped as asked"; else again saved; fi ;;
  *) again "${told:+told to leave before it could save, }failed with status $status" ;;
esac
exit $status
