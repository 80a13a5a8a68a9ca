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
timer=
status=
trap leave USR1
trap told=yes TERM  # the ranks get it too; this shell stays to say what became of them

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
# Without progress since the last start that failed, another one would not help. A start that was
# told to leave did not fail, however it ended.
again() {
  case $(insist scontrol show job -o "$job") in
    *" JobState=RUNNING "*" Restarts=$start "*)
      if [ "$status" != 75 ] && [ -z "$told" ]; then
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

# The signal is repeated, since a rank that is being started misses it. Beyond the time limit Slurm
# would not start the job again.
leave() {
  told=yes
  [ -z "$timer" ] || return
  {
    for try in 1 2 3 4 5 6 7 8 9; do
      scancel --signal=USR1 "$job" &
      sleep 30
    done
    again "did not leave in 270 s"
  } &
  timer=$!
}

# A trap runs while bash waits, but not while a command runs in the foreground.
finish() {
  wait "$1"
  while kill -0 "$1" 2> /dev/null; do wait "$1"; done  # a signal ended the wait before
  wait "$1"
}

cd /home/me/adm
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1

say "begins on $SLURM_JOB_NODELIST at checkpoint $(newest)"
if [ -n "$told" ]; then
  [ -z "$timer" ] || kill "$timer"
  again "told to leave before the ranks were started"
  exit 75
fi
srun \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  --container-image=/scratch/images/adm.sqsh \
  --container-mounts=/scratch:/scratch,/home/me:/home/me \
  --container-workdir=/home/me/adm \
  sh -c 'trap "" USR1 TERM; exec "$0" "$@"' python3 -m trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
  --patience 600 \
  --set 'training.lr = 1e-4' \
  --set 'training.precision = "bf16"' &
finish $!
status=$?
[ -z "$timer" ] || kill "$timer" 2> /dev/null

case $status in
  0)  # also what srun says when Slurm has given the job's node up
    case $(tail -n 1 "$run/log.txt") in
      *finished*) say "finished" ;;
      *"asked to stop"*) say "stopped as asked" ;;
      *) again "srun ended in mid-run" ;;
    esac ;;
  78) say "refused for the reason above; not started again" ;;
  75)
    if [ -e "$run/launch/stop" ]; then
      say "stopped as asked"
    elif tail -n 1 "$run/log.txt" 2> /dev/null | grep -q "before the first step"; then
      again "told to leave before the first step"
    else
      again saved
    fi ;;
  *)
    if [ -n "$told" ]; then
      again "told to leave, ended with status $status"
    else
      again "failed with status $status"
    fi ;;
esac
exit $status
