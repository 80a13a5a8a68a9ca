#!/bin/bash
#SBATCH --job-name=imagenet64
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=diffusion
#SBATCH --signal=B:USR1@300
#SBATCH --output=/runs/imagenet64/launch/slurm-%j.out
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --requeue

# imagenet64: 64 nodes x 8 ranks, from the code and the preset in /runs/imagenet64.
run=/runs/imagenet64
start=${SLURM_RESTART_COUNT:-0}
told=
trap leave USR1
trap : TERM  # the ranks save; this shell stays to say what became of them

say() {
  printf '%s  job %s start %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$start" "$*" |
    tee -a "$run/launch/events.txt"
}

newest() {
  newest=$(ls "$run/checkpoints" 2> /dev/null | grep -Ex '[0-9]{12}' | tail -n 1)
  echo "${newest:-none}"
}

# A cancelled job stays so, and a shell whose node Slurm gave up must not touch the next start.
again() {
  case $(scontrol show job -o "$SLURM_JOB_ID") in
    *" JobState=RUNNING "*" Restarts=$start "*)
      say "$1; goes on from checkpoint $(newest)"
      scontrol requeue "$SLURM_JOB_ID" ;;
    *) say "$1; cancelled, or already started again" ;;
  esac
}

leave() {
  told=yes
  scancel --signal=USR1 "$SLURM_JOB_ID"
  # Beyond the time limit Slurm would not start the job again.
  { sleep 270; again "did not leave in 270 s"; } &
  timer=$!
}

cd /home/me/adm
module load cuda/12.6
export PATH=/home/me/adm/.venv/bin:$PATH
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=4
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1

say "begins on $SLURM_JOB_NODELIST at checkpoint $(newest)"
srun \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  /home/me/adm/.venv/bin/python -m launch check \
  --ranks 512 \
  --run /runs/imagenet64 || {
  say "the check above found a fault; not started"
  exit 2
}
srun \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  /home/me/adm/.venv/bin/python -m trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
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
      *) again "srun ended in mid-run" ;;
    esac ;;
  2) say "refused for the reason above; not started again" ;;
  75) if [ -e "$run/launch/stop" ]; then say "stopped as asked"; else again "saved"; fi ;;
  *)
    if [ -n "$told" ]; then
      again "told to leave before it could save"
    elif [ "$(cat "$run/launch/failed-at" 2> /dev/null)" = "$(newest)" ]; then
      say "failed twice (status $status) at checkpoint $(newest): not started again"
    else
      newest > "$run/launch/failed-at"
      again "failed with status $status"
    fi ;;
esac
exit $status
