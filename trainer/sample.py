"""`python -m trainer.sample RUN --out FILE.npz`: draw images from a run's EMA or a weights file.

Image i is drawn from (seed, i) in a fixed batch, so it is the same on any number of ranks. Each
batch is put on disk when it is done, and after an interruption the same command resumes. The
result is what the ADM evaluator reads: uint8 NHWC in `arr_0`, labels in `arr_1`; and a PNG grid.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.exits import CommandParser
from trainer.adm.config import UNetConfig
from trainer.draw import DTYPES
from trainer.networks import SampleInputs, check_guide
from trainer.parts import PartSampler, SampleRequest
from trainer.progress import Progress
from trainer.ranks.group import agreed, connected, from_main, gather, run_as_rank
from trainer.ranks.world import World, join
from trainer.samplefile import merge, open_parts, part_fault, read_low_res, write_part


def sample(arguments: argparse.Namespace, *, world: World, device: torch.device) -> int:
    """Draw what was asked for; returns the exit status."""
    out: Path = arguments.out
    directory = out.with_suffix(".parts")
    sources = from_main(lambda: SampleInputs.find(arguments))
    request, sampler = agreed(lambda: prepare(arguments, sources=sources, device=device))
    from_main(lambda: open_parts(directory, out, vars(request)))
    files = [directory / f"{part:06d}.npz" for part in range(request.parts)]
    todo = _undrawn(files, request=request, size=sampler.image_size, world=world)
    mine = todo[world.rank :: world.size]
    total = len(mine) * sampler.steps
    progress = Progress(total=total, done=0, unit="denoising steps", shown=world.is_main)
    for count, part in enumerate(mine):
        write_part(files[part], *sampler.draw(part, on_step=progress.advance))
        if world.is_main:
            each = f"batch {count + 1} of {len(mine)} on each of {world.size} ranks"
            print(f"{each}, {progress.left()} left", flush=True)
    dist.barrier()
    columns = len(request.classes or ())
    shown = columns if 0 < columns <= 20 else None
    from_main(lambda: merge(files, out, images=request.images, columns=shown))
    if world.is_main:
        print(f"wrote {out} and {out.with_suffix('.png')}")
    return 0


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
    if arguments.images < 1 or arguments.batch < 1:
        raise ValueError("--images and --batch must be at least 1")
    low_res, low_labels = read_low_res(arguments.low_res, model=model, images=arguments.images)
    count = model.num_classes
    if classifier is not None:
        check_guide(classifier, network=source)
        count = classifier.config.model.num_classes
    classes = _classes(arguments.classes, low_labels, count=count)
    eta = arguments.eta
    if eta is None and arguments.steps.startswith("ddim"):
        eta = 0.0
    request = SampleRequest(
        images=arguments.images,
        batch=arguments.batch,
        seed=arguments.seed,
        steps=arguments.steps,
        eta=eta,
        scale=arguments.scale if classifier is not None else 0.0,
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
    scale = "multiply the classifier's gradient by this (default: %(default)s)"
    add("--scale", type=float, default=1.0, help=scale)
    add("--classes", help="draw these classes in turn, such as 0,3,7 (default: all)")
    low_res = "the .npz of samples that an upsampler enlarges (required for one)"
    add("--low-res", type=Path, help=low_res)
    add("--ema", type=float, help="which of the run's EMA decays to draw from (default: the first)")
    precision = "compute in this precision (default: as trained; fp32 on a CPU)"
    add("--precision", choices=sorted(DTYPES), help=precision)
    add("--seed", type=int, default=0, help="the seed of all noise (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    world = join()
    # Ranks wait for the slowest one's last batch, which may take long.
    with connected(world, patience=4 * 3600) as device:
        return sample(arguments, world=world, device=device)


if __name__ == "__main__":
    run_as_rank(main)
