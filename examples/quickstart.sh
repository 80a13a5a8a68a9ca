#!/usr/bin/env bash
# The whole path in a few minutes, on this machine's GPUs or, without one, on two CPU processes:
# pack real images, train both networks (one is interrupted and resumed), draw guided samples, and
# have an independent classifier judge them. All files are written to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/quickstart
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$((gpus > 0 ? 1 : 2))
while ((2 * ranks <= gpus && ranks < 64)); do ranks=$((2 * ranks)); done # a batch of 64 must divide
((gpus > 0)) || export OMP_NUM_THREADS=1 # one core for each rank

say() { printf '\n== %s\n' "$*"; }
each_rank=(torchrun --standalone --nproc-per-node "$ranks" -m --)
data=(--set "data.shards = \"$out/shards\"")
classifier=("${each_rank[@]}" trainer.train digits_classifier --run "$out/classifier" "${data[@]}")
digits=("${each_rank[@]}" trainer.train digits --run "$out/digits" "${data[@]}")
sample=("${each_rank[@]}" trainer.sample "$out/digits" --images 200 --batch 50 --steps 50)

say "1. Pack 1797 handwritten digits into WebDataset shards"
[ -e "$out/shards/manifest.json" ] || python -m data.pack digits "$out/shards" --size 8

say "2. Train the noisy classifier on $ranks ranks with ZeRO-2 (the first start compiles for a minute)"
"${classifier[@]}"

say "3. Train the diffusion model, and interrupt it"
if [ ! -d "$out/digits/checkpoints" ]; then
  "${digits[@]}" 2> "$out/interrupted.log" & # torchrun's report of the interruption is long
  until [ -s "$out/digits/metrics.jsonl" ]; do
    sleep 1
    kill -0 $! 2> /dev/null || { cat "$out/interrupted.log"; exit 1; }
  done
  kill -TERM $!
  wait $! || true
fi

say "4. Rerun the same command to resume"
"${digits[@]}"

say "5. Draw 200 images, 20 of each digit, with and without classifier guidance"
rm -f "$out"/{guided,unguided}.npz
"${sample[@]}" --out "$out/guided.npz" --classifier "$out/classifier" --scale 2
"${sample[@]}" --out "$out/unguided.npz"

say "6. Measure how many of them an independent classifier recognises"
python examples/judge_digits.py "$out/guided.npz" "$out/unguided.npz"

say "Done. The samples: $out/guided.png. The curves: .venv/bin/tensorboard --logdir runs"
