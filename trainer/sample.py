"""`python -m trainer.sample RUN --out FILE.npz`: draw images from a run's EMA or a weights file.

Image i is drawn from (seed, i) in a fixed batch, so it is the same on any number of ranks. Each
batch is put on disk when it is done, and after an interruption the same command resumes. The
result is what the ADM evaluator reads: uint8 NHWC in `arr_0`, labels in `arr_1`; and a PNG grid.
"""

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.exits import TO_BE_CONTINUED, CommandParser
from trainer.adm.config import UNetConfig, check
from trainer.draw import DTYPES
from trainer.networks import SampleInputs, check_guide
from trainer.partfiles import claimed, merge, open_parts, part_fault, read_low_res, write_part
from trainer.parts import PartSampler, SampleRequest
from trainer.progress import Progress
from trainer.ranks.group import agreed, connected, from_main, gather, run_as_rank
from trainer.ranks.signals import Preemption
from trainer.ranks.world import World, join


def sample(
    arguments: argparse.Namespace, *, world: World, device: torch.device, preemption: Preemption
) -> int:
    """Draw what was asked for; returns the exit status."""
    out: Path = arguments.out
    agreed(lambda: check_options(arguments))
    directory = out.with_suffix(".parts")
    sources = from_main(lambda: SampleInputs.find(arguments))
    request, sampler = agreed(lambda: prepare(arguments, sources=sources, device=device))
    from_main(lambda: open_parts(directory, out, vars(request)))
    with ExitStack() as stack:
        agreed(lambda: stack.enter_context(claimed(directory)) if world.is_main else None)
        return _sample(request, sampler, out=out, world=world, preemption=preemption)


def _sample(
    request: SampleRequest, sampler: PartSampler, *, out: Path, world: World, preemption: Preemption
) -> int:
    directory = out.with_suffix(".parts")
    files = [directory / f"{part:06d}.npz" for part in range(request.parts)]
    todo = _undrawn(files, request=request, size=sampler.image_size, world=world)
    mine = todo[world.rank :: world.size]
    total = len(mine) * sampler.steps
    progress = Progress(total=total, done=0, unit="denoising steps", shown=world.is_main)

    def on_step() -> None:
        progress.advance()
        if preemption.stop_requested:
            raise _StoppedError

    with suppress(_StoppedError):
        for count, part in enumerate(mine):
            write_part(files[part], *sampler.draw(part, on_step=on_step))
            if world.is_main:
                each = f"batch {count + 1} of {len(mine)} on each of {world.size} ranks"
                print(f"{each}, {progress.left()} left", flush=True)
    if not all(gather(all(files[part].exists() for part in mine))):
        if world.is_main:
            print("stopped by a signal; rerun the same command to resume")
        return TO_BE_CONTINUED
    columns = len(request.classes or ())
    shown = columns if 0 < columns <= 20 else None
    from_main(lambda: merge(files, out, images=request.images, columns=shown))
    if world.is_main:
        print(f"wrote {out} and {out.with_suffix('.png')}")
    return 0


class _StoppedError(Exception):
    """A signal has come between two denoising steps."""


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and values that mean nothing.

    Raises:
        ValueError: naming the option, its value and what it must be.
    """
    guided, from_run = arguments.classifier is not None, arguments.source.is_dir()
    check(arguments.out.suffix == ".npz", "--out", str(arguments.out), "a file that ends in .npz")
    check(arguments.images >= 1, "--images", arguments.images, "at least 1")
    check(arguments.batch >= 1, "--batch", arguments.batch, "at least 1")
    eta, scale = arguments.eta, arguments.scale
    check(eta is None or 0 <= eta <= 1, "--eta", eta, "from 0 to 1")
    check(scale is None or math.isfinite(scale), "--scale", scale, "a finite number")
    check(guided or scale is None, "--scale", scale, "absent without --classifier")
    preset = arguments.classifier_preset
    check(guided or preset is None, "--classifier-preset", preset, "absent without --classifier")
    check(from_run or arguments.ema is None, "--ema", arguments.ema, "absent for a weights file")


def _undrawn(
    files: Sequence[Path], *, request: SampleRequest, size: int, world: World
) -> list[int]:
    """The parts that are missing or damaged; each rank checks its share, and all learn of all."""
    listed = from_main(lambda: [part for part, file in enumerate(files) if file.exists()])
    mine: dict[int, str] = {}
    for part in listed[world.rank :: world.size]:
        labels = request.recorded(request.indices(part)).numpy()
        if fault := part_fault(files[part], shape=(len(labels), size, size, 3), labels=labels):
            mine[part] = fault
    damaged = {part: fault for faults in gather(mine) for part, fault in faults.items()}
    if world.is_main:
        for part in sorted(damaged):
            print(f"{files[part]} is damaged and is drawn again: {damaged[part]}", flush=True)
    whole = set(listed) - set(damaged)
    return [part for part in range(request.parts) if part not in whole]


def prepare(
    arguments: argparse.Namespace, *, sources: SampleInputs, device: torch.device
) -> tuple[SampleRequest, PartSampler]:
    """Read and check all that the command line asks for.

    Raises:
        ValueError: a file, a class, or a combination that does not work.
    """
    source, classifier = sources.denoiser, sources.classifier
    model = source.config.model
    if not isinstance(model, UNetConfig):
        raise ValueError(f"{source.file} is a classifier; give it as --classifier")
    low_res, low_labels = read_low_res(arguments.low_res, model=model, images=arguments.images)
    count = model.num_classes
    if classifier is not None:
        check_guide(classifier, network=source)
        count = classifier.config.model.num_classes
    classes = _classes(arguments.classes, low_labels, count=count)
    eta, scale = arguments.eta, 1.0 if arguments.scale is None else arguments.scale
    if eta is None and arguments.steps.startswith("ddim"):
        eta = 0.0
    request = SampleRequest(
        images=arguments.images,
        batch=arguments.batch,
        seed=arguments.seed,
        steps=arguments.steps,
        eta=eta,
        scale=scale if classifier is not None else 0.0,
        classes=classes,
        precision=arguments.precision,
        device=device.type,
        sources=tuple(s.sha256 for s in (source, classifier) if s is not None),
        low_res=sources.low_res,
    )
    return request, PartSampler(
        request, source=source, classifier=classifier, low_res=low_res, device=device
    )


def _classes(
    text: str | None, low_labels: NDArray[np.int64] | None, *, count: int | None
) -> tuple[int, ...] | None:
    """The classes of `--classes`, else those of the `--low-res` images, else all `count`."""
    if count is None and text is not None:
        raise ValueError("--classes: the network has no classes and there is no --classifier")
    if count is None:
        return None
    if text is not None:
        option, classes = "--classes", _class_list(text)
    elif low_labels is not None:
        option, classes = "--low-res", tuple(low_labels.tolist())
    else:
        return tuple(range(count))
    if wrong := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"{option}: {wrong[0]} is not among the classes 0 to {count - 1}")
    return classes


def _class_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--classes {text!r}: write numbers, as in --classes 0,3,7") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.sample", description=__doc__)
    add = p.add_argument
    source = "a run, one of its checkpoints, or a weights file and --preset"
    add("source", type=Path, help=source)
    add("--preset", help="the preset whose network a weights file holds (default: the run's own)")
    add("--out", type=Path, required=True, help="the .npz to write; a .png grid goes beside it")
    add("--images", type=int, default=100, help="images to draw (default: %(default)s)")
    add("--batch", type=int, default=32, help="images at once on a rank (default: %(default)s)")
    steps = 'denoising steps, such as "250", "90,60,60,20,20" or "ddim25" (default: %(default)s)'
    add("--steps", default="250", help=steps)
    eta = "use DDIM with this eta (default: 0 for ddimN, and the ancestral sampler for others)"
    add("--eta", type=float, help=eta)
    classifier = "guide by this classifier, a run or a weights file (default: no guidance)"
    add("--classifier", type=Path, help=classifier)
    add(
        "--classifier-preset", help="the preset of a classifier's weights file (default: its run's)"
    )
    scale = "multiply the classifier's gradient by this (default: 1.0)"
    add("--scale", type=float, help=scale)
    add("--classes", help="draw these classes in turn, such as 0,3,7 (default: all)")
    low_res = "the .npz of samples that an upsampler enlarges (required for one)"
    add("--low-res", type=Path, help=low_res)
    add("--ema", type=float, help="which of the run's EMA decays to draw from (default: the first)")
    precision = "compute in this precision (default: as trained; fp32 on a CPU)"
    add("--precision", choices=sorted(DTYPES), help=precision)
    add("--seed", type=int, default=0, help="the seed of all noise (default: %(default)s)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # `deepspeed` passes it
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    world = join()
    # Ranks wait for the slowest one's last batch, which may take long.
    with Preemption() as preemption, connected(world, patience=4 * 3600) as device:
        return sample(arguments, world=world, device=device, preemption=preemption)


if __name__ == "__main__":
    run_as_rank(main)
