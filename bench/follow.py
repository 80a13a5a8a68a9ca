"""guided-diffusion's own training and ours, from the same weights, on the same images and noise.

    python -m bench.follow --guided-diffusion PATH [--steps 200] [--ranks 2] [--ds-config FILE]

The quickstart's two networks, in fp32 on the CPU. Theirs is its `TrainLoop` and its
`classifier_train.py` in one process, which get the images of our stream, and the timesteps and the
noise that we draw for them. Ours is `trainer.train`: shards, ranks, micro-batches, ZeRO. Shown is
how far apart the losses of a step are, and in the end the weights and averages. guided-diffusion
wants `pip install blobfile`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from bench import reference
from bench.reference import Training, Weights
from data.stream import open_stream
from trainer import weights
from trainer.adm import keyed
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.ranks.commands import on_ranks

#: What is set otherwise than in a preset, to be a recipe of guided-diffusion's.
PRESETS = {"digits": (), "digits_classifier": ("model.dropout = 0.0",)}
UNSET = ("training.ema_warmup",)
#: Several micro-batches to each rank's step.
MICRO_BATCH = 16


def settings(preset: str, *, shards: Path, steps: int) -> list[str]:
    """What both train, as `--set` takes it: every loss is shown, and no warm-up, as theirs."""
    batch = configs.load(preset).training.batch
    return [
        *PRESETS[preset],
        f"data.shards = {json.dumps(str(shards))}",
        f"training.images = {steps * batch}",
        f"training.micro_batch = {MICRO_BATCH}",
        "training.warmup_images = 0",
        f"intervals.log = {batch}",
        f"intervals.checkpoint = {steps * batch}",
    ]


def changes(sets: Sequence[str]) -> list[str]:
    """The words that change a preset so on the command line."""
    words = [("--set", each) for each in sets] + [("--unset", each) for each in UNSET]
    return [word for pair in words for word in pair]


def initial(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights for these names, the same bits on every machine, and nowhere 0."""
    found = {}
    for name, shape in shapes.items():
        index = torch.tensor([crc32(name.encode())])
        (value,) = keyed.normal(index, seed=0, stream=0, shape=tuple(shape))
        if len(shape) > 1:
            found[name] = value / value[0].numel() ** 0.5
        else:
            found[name] = value / 10 + (1.0 if name.endswith("weight") else 0.0)
    return found


def ours(run: Path, *, ranks: int, arguments: Sequence[str], log: Path) -> None:
    """Train the run in `ranks` processes; SystemExit, with its output, if that fails."""
    command = on_ranks(["trainer.train", *arguments, "--run", str(run)], ranks=ranks)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(log.read_text())


def of_run(run: Path) -> Training:
    """What a run of ours came to."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    *_, checkpoint = sorted((run / "checkpoints").iterdir())
    files = [checkpoint / "model.safetensors", *checkpoint.glob("ema-*.safetensors")]
    return Training(losses, {file.stem: weights.load(file) for file in files})


@torch.no_grad()
def apart(one: Weights, other: Weights, *, start: Weights) -> float:
    """How far apart two sets of weights are, as a share of how far `other` is from `start`."""
    between = sum(float((one[k] - other[k]).double().square().sum()) for k in start)
    moved = sum(float((start[k] - other[k]).double().square().sum()) for k in start)
    return (between / moved) ** 0.5


@torch.no_grad()
def sketch(last: Weights, *, start: Weights) -> list[float]:
    """How far weights have moved, and how far in each of eight random directions."""
    moved, steps = 0.0, torch.zeros(8, dtype=torch.float64)
    for name, value in start.items():
        change = (last[name] - value).double()
        index = torch.tensor([crc32(name.encode())])
        shape = (8, change.numel())
        (directions,) = keyed.normal(index, seed=1, stream=0, shape=shape)
        moved += float(change.square().sum())
        steps += directions.double() @ change.flatten()
    return [moved**0.5, *steps.tolist()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.follow`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.follow", description=__doc__)
    add = parser.add_argument
    add("--guided-diffusion", type=Path, required=True, metavar="PATH", help="a checkout of it")
    add("--steps", type=int, default=200, help="default: %(default)s")
    add("--ranks", type=int, default=2, help="of ours (default: %(default)s)")
    add("--ds-config", type=Path, help="of ours (default: ds_config.json of the repository)")
    add("--record", type=Path, metavar="FILE", help="write what theirs came to")
    options = parser.parse_args(argv)
    if not (options.guided_diffusion / "scripts" / "classifier_train.py").is_file():
        parser.error(f"{options.guided_diffusion} has no scripts/classifier_train.py")
    if importlib.util.find_spec("blobfile") is None:
        parser.error("guided-diffusion needs blobfile: pip install blobfile")
    # Both train on the CPU, where there is a GPU too.
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    recorded = {}
    print(f"{'network':18} {'steps':>5} {'loss, first':>12} {'largest':>8}  weights and averages")
    for preset in PRESETS:
        with TemporaryDirectory() as scratch:
            recorded[preset] = _follow(preset, options, scratch=Path(scratch))
    if options.record:
        options.record.write_text(json.dumps(recorded, indent=1) + "\n")
    return 0


def _follow(preset: str, options: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Train both from one start and show how far apart they are; returns what theirs came to."""
    shards, start = scratch / "shards", scratch / "start.pt"
    subprocess.run(
        [sys.executable, "-m", "data.pack", "digits", str(shards), "--size", "8"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sets = settings(preset, shards=shards, steps=options.steps)
    config = configs.load(preset, sets, unset=UNSET)
    begun = initial({name: p.shape for name, p in build(config.model).named_parameters()})
    torch.save(begun, start)
    arguments = [preset, "--init", str(start), *changes(sets)]
    if options.ds_config:
        arguments += ["--ds-config", str(options.ds_config)]
    ours(scratch / "run", ranks=options.ranks, arguments=arguments, log=scratch / "log.txt")
    mine = of_run(scratch / "run")
    with open_stream(config.data, seed=config.training.seed) as stream:
        draws = reference.Draws(stream, config, steps=options.steps)
        other = reference.train(
            config, draws, path=options.guided_diffusion, start=start, scratch=scratch / "theirs"
        )
    shares = [abs(a - b) / abs(b) for a, b in zip(mine.losses, other.losses, strict=True)]
    ends = {name: apart(mine.last[name], last, start=begun) for name, last in other.last.items()}
    text = ", ".join(f"{name} {share:.1e}" for name, share in ends.items())
    print(f"{preset:18} {options.steps:5} {shares[0]:12.1e} {max(shares):8.1e}  {text}", flush=True)
    sketches = {name: sketch(last, start=begun) for name, last in other.last.items()}
    return {"losses": other.losses, "sketches": sketches}


if __name__ == "__main__":
    sys.exit(main())
