"""`python -m trainer.sample RUN --out FILE.npz`: draw images from a run's EMA or a weights file.

Image i is drawn from (seed, i) in a fixed batch, so it is the same on any number of ranks. Each
batch is put on disk when it is done, and the same command goes on after an interruption. The
result is what the ADM evaluator reads: uint8 NHWC in `arr_0`, labels in `arr_1`; and a PNG grid.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from launch.world import World, join
from trainer.adm.diffusion import Diffusion
from trainer.adm.sampler import Guidance, classifier_guidance
from trainer.adm.unet import UNetConfig
from trainer.draw import DTYPES, Walk, draw, to_pixels
from trainer.group import agreed, connected, run_as_rank
from trainer.metrics import Progress
from trainer.samplefile import merge, open_parts, part_fault, read_low_res, write_part
from trainer.sources import Source, Sources, check_guide


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is drawn: everything that decides the pixels. Parts of two requests never mix."""

    images: int
    batch: int
    seed: int
    steps: str
    eta: float | None
    scale: float
    classes: tuple[int, ...] | None
    precision: str | None
    device: str
    #: Checksums of the weights, and of the images that an upsampler enlarges.
    sources: tuple[str, ...]
    low_res: str | None

    def numbers(self, part: int) -> Tensor:
        """The image numbers of one part, (B,) int64."""
        return torch.arange(part * self.batch, min((part + 1) * self.batch, self.images))

    @property
    def parts(self) -> int:
        return -(-self.images // self.batch)

    def labels(self, numbers: Tensor) -> Tensor | None:
        """The classes in turn: equally many of each, whatever the number of images."""
        if self.classes is None:
            return None
        return torch.tensor(self.classes)[numbers % len(self.classes)]

    def recorded(self, numbers: Tensor) -> Tensor:
        """The labels that the file holds: zeros where there are no classes."""
        labels = self.labels(numbers)
        return torch.zeros_like(numbers) if labels is None else labels


class Sampler:
    """The networks of a request, ready to draw any of its parts."""

    def __init__(
        self,
        request: Request,
        *,
        source: Source,
        classifier: Source | None,
        low_res: NDArray[np.uint8] | None,
        device: torch.device,
    ) -> None:
        assert isinstance(source.config.model, UNetConfig)
        self._request = request
        self._config = source.config.model
        self._net = source.net(device=device, precision=request.precision)
        self._classifier = None
        if classifier is not None:
            self._classifier = classifier.net(device=device, precision=request.precision)
        self._low_res = low_res
        self._device = device
        self._walk = Walk(
            diffusion=Diffusion(source.config.diffusion, respacing=request.steps),
            seed=request.seed,
            eta=request.eta,
        )

    @property
    def steps(self) -> int:
        return self._walk.diffusion.steps

    @property
    def image_size(self) -> int:
        return self._config.image_size

    def draw(
        self, part: int, *, on_step: Callable[[], None]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """One part: images uint8 (B, 3, H, W) and their labels (B,), zeros if there are none.

        Raises:
            ValueError: an image is not finite.
        """
        numbers = self._request.numbers(part)
        labels = self._request.labels(numbers)
        on_device = None if labels is None else labels.to(self._device)
        with torch.no_grad():
            images = draw(
                self._net,
                numbers.to(self._device),
                config=self._config,
                walk=self._walk,
                labels=on_device if self._config.num_classes is not None else None,
                low_res=self._conditions(numbers),
                guidance=self._guidance(on_device),
                on_step=on_step,
            )
        if not images.isfinite().all():
            raise ValueError(
                f"images {numbers.tolist()[:3]}... are not finite: draw in another --precision "
                "(bf16 or fp32), or check the weights"
            )
        return to_pixels(images).cpu().numpy(), self._request.recorded(numbers).numpy()

    def _guidance(self, labels: Tensor | None) -> Guidance | None:
        if self._classifier is None:
            return None
        assert labels is not None
        return classifier_guidance(self._classifier, labels, scale=self._request.scale)

    def _conditions(self, numbers: Tensor) -> Tensor | None:
        if self._low_res is None:
            return None
        pixels = torch.from_numpy(self._low_res[numbers.numpy()]).to(self._device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def sample(arguments: argparse.Namespace, *, world: World, device: torch.device) -> int:
    """Draw what was asked for; returns the exit status."""
    out: Path = arguments.out
    directory = out.with_suffix(".parts")
    found = [agreed(lambda: Sources.find(arguments) if world.is_main else None)]
    dist.broadcast_object_list(found)
    sources = found[0]
    assert sources is not None
    request, sampler = agreed(lambda: prepare(arguments, sources=sources, device=device))
    agreed(lambda: open_parts(directory, out, vars(request)) if world.is_main else None)
    files = [directory / f"{part:06d}.npz" for part in range(request.parts)]
    todo = _undrawn(files, request=request, size=sampler.image_size, world=world)
    mine = todo[world.rank :: world.size]
    total = len(mine) * sampler.steps
    progress = Progress(total=total, done=0, unit="steps of the walks", shown=world.is_main)
    for count, part in enumerate(mine):
        write_part(files[part], *sampler.draw(part, on_step=progress.advance))
        if world.is_main:
            each = f"batch {count + 1} of {len(mine)} on each of {world.size} ranks"
            print(f"{each}, {progress.left()} left", flush=True)
    dist.barrier()
    columns = len(request.classes or ())
    shown = columns if 0 < columns <= 20 else None
    agreed(
        lambda: merge(files, out, images=request.images, columns=shown) if world.is_main else None
    )
    if world.is_main:
        print(f"wrote {out} and {out.with_suffix('.png')}")
    return 0


def _undrawn(files: Sequence[Path], *, request: Request, size: int, world: World) -> list[int]:
    """The parts that are missing or damaged; each rank checks its share, and all learn of all."""
    listed = [[part for part, file in enumerate(files) if file.exists()]]
    dist.broadcast_object_list(listed)
    mine: dict[int, str] = {}
    for part in listed[0][world.rank :: world.size]:
        labels = request.recorded(request.numbers(part)).numpy()
        if fault := part_fault(files[part], shape=(len(labels), size, size, 3), labels=labels):
            mine[part] = fault
    everyone: list[dict[int, str]] = [{}] * world.size
    dist.all_gather_object(everyone, mine)
    damaged = {part: fault for faults in everyone for part, fault in faults.items()}
    if world.is_main:
        for part in sorted(damaged):
            print(f"{files[part]} is damaged and is drawn again: {damaged[part]}", flush=True)
    whole = set(listed[0]) - set(damaged)
    return [part for part in range(request.parts) if part not in whole]


def prepare(
    arguments: argparse.Namespace, *, sources: Sources, device: torch.device
) -> tuple[Request, Sampler]:
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
    request = Request(
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
    return request, Sampler(
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
        option, classes = "--classes", _numbers(text)
    elif low_labels is not None:
        option, classes = "--low-res", tuple(low_labels.tolist())
    else:
        return tuple(range(count))
    if wrong := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"{option}: {wrong[0]} is not among the classes 0 to {count - 1}")
    return classes


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--classes {text!r}: write numbers, as in --classes 0,3,7") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m trainer.sample", description=__doc__)
    p.add_argument(
        "source",
        type=Path,
        help="a run, one of its checkpoints, or a weights file and --preset",
    )
    p.add_argument("--preset", help="the network of a weights file")
    p.add_argument("--out", type=Path, required=True, help="the .npz to write; a .png beside it")
    p.add_argument("--images", type=int, default=100)
    p.add_argument("--batch", type=int, default=32, help="images drawn at once on a rank")
    p.add_argument("--steps", default="250", help='respacing: "250", "90,60,60,20,20", "ddim25"')
    p.add_argument("--eta", type=float, help="DDIM with this eta (0 for ddimN), else ancestral")
    p.add_argument("--classifier", type=Path, help="a classifier's run directory or weights file")
    p.add_argument("--classifier-preset", help="the network of a classifier's weights file")
    p.add_argument("--scale", type=float, default=1.0, help="of the classifier's gradient")
    p.add_argument("--classes", help="such as 0,3,7; by default all in turn")
    p.add_argument("--low-res", type=Path, help="an .npz of samples that an upsampler enlarges")
    p.add_argument("--ema", type=float, help="which of a run's EMA decays; by default the first")
    p.add_argument(
        "--precision",
        choices=sorted(DTYPES),
        help="as it was trained; fp32 on a CPU",
    )
    p.add_argument("--seed", type=int, default=0)
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
