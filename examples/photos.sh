#!/usr/bin/env bash
# From JPEGs in class folders to pictures guided and enlarged, in 10 to 20 minutes on two cores: a base
# of 16 pixels, a classifier trained on random crops, an upsampler 16 -> 32, each validated on images
# that were held out. Without an argument the photographs are cut from scikit-learn's two.
# Usage: examples/photos.sh [DIRECTORY]. Ctrl-C stops it; the same command resumes.
set -euo pipefail
photos=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
out=runs/photos${photos:+-$(basename "$photos" | tr -c 'A-Za-z0-9._\n-' _)}
# shellcheck source=examples/steps.sh
. examples/steps.sh 6

step "Photographs, a folder for each class"
if [ -z "$photos" ]; then
  photos=$out/jpegs
  python examples/photos.py "$photos"
else
  echo "$photos"
fi

step "Pack nine tenths of them for training, the others for validation"
pack=(python -m data.pack "$photos" --size 40 --keep-original --exif-transpose)
"${pack[@]}" "$out/train" --split train
"${pack[@]}" "$out/val" --split val
classes=$(python -c "import sys; from data.dataset import class_names; print(len(class_names(sys.argv[1])))" "$out/train")

class=(--set "model.num_classes = $classes") guide=(--classifier "$out/classifier" --scale 1)
((classes > 1)) || class=(--unset model.num_classes) guide=()

train() { # train PRESET RUN
  "${each_rank[@]}" trainer.train "examples/$1.toml" --run "$out/$2" "${class[@]}" \
    --set "data.shards = '$out/train'" --set "data.validation = '$out/val'"
}

step "Train the base at 16 pixels on $ranks ranks (the first start compiles for a minute)"
train photos16 base

step "Train the classifier, on random crops"
if ((classes > 1)); then train photos16_classifier classifier; else echo "there is one class"; fi

step "Train the upsampler, 16 -> 32 pixels"
train photos16_32 upsampler

step "Draw 36 pictures with classifier guidance, and enlarge them"
"${each_rank[@]}" trainer.sample "$out/base" --out "$out/guided.npz" --images 36 --batch 18 \
  --steps 100 "${guide[@]}" --upsampler "$out/upsampler" --upsampler-steps 50
runs=("$out/base" "$out/classifier" "$out/upsampler")
((classes > 1)) || unset 'runs[1]'
python examples/curve.py "$out/curve.png" "${runs[@]}"
took

cat << END

The pictures, each beside its low resolution: $out/guided.png (a column for each class)
The curves: $out/curve.png
Next:
  python -m trainer.sample $out/base --out $out/class-0.npz --classes 0 --images 9 --classifier $out/classifier --upsampler $out/upsampler
  python -m trainer.evaluate classifier $out/classifier --data $out/val
  bash examples/photos.sh /path/to/your/photographs   # a folder for each class
END
