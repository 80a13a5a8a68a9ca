# Sourced by the examples, with their number of steps: a status line and the time of each of them,
# and the ranks of this machine.
# shellcheck shell=bash
steps=$1 n=0 since=$SECONDS

# step TEXT: begin the next step.
step() {
  took
  n=$((n + 1)) since=$SECONDS
  printf '\n== %d of %d: %s\n' "$n" "$steps" "$*"
}

took() {
  ((n == 0)) || printf '== %d of %d took %d s\n' "$n" "$steps" $((SECONDS - since))
}

ended() {
  local status=$?
  ((status == 0)) || printf '\n== %d of %d ended with status %d; the same command resumes there\n' \
    "$n" "$steps" "$status" >&2
}
trap ended EXIT

# A rank for each GPU, so far as batches of 32 divide; without a GPU, two on the CPU.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$((gpus > 0 ? 1 : 2))
while ((2 * ranks <= gpus && ranks < 32)); do ranks=$((2 * ranks)); done
((gpus > 0)) || export OMP_NUM_THREADS=1 # one core for each rank
each_rank=(torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node "$ranks" -m --)
