#!/usr/bin/env bash
# The whole path in some minutes, on this machine's GPUs or, without one, on two CPU processes: pack real
# images, train both networks (one is interrupted and resumed), draw guided samples, and have an
# independent classifier judge them. All files are written to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/quickstart
# shellcheck source=examples/steps.sh
. examples/steps.sh 6

data=(--set "data.shards = \"$out/shards\"")
classifier=("${each_rank[@]}" trainer.train digits_classifier --run "$out/classifier" "${data[@]}")
digits=("${each_rank[@]}" trainer.train digits --run "$out/digits" "${data[@]}")
sample=("${each_rank[@]}" trainer.sample "$out/digits" --images 200 --batch 50 --steps 50)

step "Pack 1797 handwritten digits into WebDataset shards"
[ -e "$out/shards/manifest.json" ] || python -m data.pack digits "$out/shards" --size 8

step "Train the noisy classifier on $ranks ranks with ZeRO-2 (the first start compiles for a minute)"
"${classifier[@]}"

step "Train the diffusion model, and interrupt it"
if [ ! -d "$out/digits/checkpoints" ]; then
  "${digits[@]}" 2> "$out/interrupted.log" & # torchrun's report of the interruption is long
  until [ -s "$out/digits/metrics.jsonl" ]; do
    sleep 1
    kill -0 $! 2> /dev/null || { cat "$out/interrupted.log"; exit 1; }
  done
  kill -TERM $!
  wait $! || true
fi

step "Rerun the same command to resume"
"${digits[@]}"

step "Draw 200 images, 20 of each digit, with and without classifier guidance"
rm -rf "$out"/{guided,unguided}.{npz,png,parts}
"${sample[@]}" --out "$out/guided.npz" --classifier "$out/classifier" --scale 2
"${sample[@]}" --out "$out/unguided.npz"

step "Draw the loss, and measure how many digits an independent classifier recognises"
python examples/curve.py "$out/curve.png" "$out/digits" "$out/classifier"
python examples/judge_digits.py "$out/guided.npz" "$out/unguided.npz"
took

cat << END

The digits: $out/guided.png (a column for each class). The loss: $out/curve.png
Next:
  tensorboard --logdir runs --samples_per_plugin images=200
  python -m trainer.sample $out/digits --classifier $out/classifier --scale 4 --classes 3,7 --images 20 --out $out/sevens.npz
  make photos   # photographs: classes, validation, two stages
END
