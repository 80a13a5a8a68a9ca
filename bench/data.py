"""Speed of the data layer, as ratios measured on one machine in one run.

    python -m bench.data [--sizes 128 256] [--rounds 3]

Each system runs in a process of its own; rounds alternate between the systems, so that other load
on the machine affects all of them, and the medians are compared. Needs scikit-learn for the
photographs; MosaicML Streaming is compared where `import streaming` works.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from bench.photos import make_photos
from bench.systems import BATCH, SYSTEMS, mosaicml_copy
from data.config import DataConfig
from data.dataset import open_shards
from data.order import Order
from data.packing.plan import PackConfig
from data.stream import Stream
from data.transforms import center_crop

WARM_UP_S = 1.5
# Images in ImageNet's training split.
IMAGENET = 1_281_167
# Copies of each photograph in the packed set.
REPEATS = 4
# Photographs for timing Pillow, drawn at random: they differ in cost.
BY_HAND = 800


class Speed(NamedTuple):
    """Images per second, CPU milliseconds per image, MiB of memory; all processes together."""

    images_s: float
    cpu_ms: float
    mib: float


def measure(name: str, root: Path, *, size: int, workers: int, seconds: float) -> Speed:
    """Run one system in this process and its children."""
    batches = SYSTEMS[name](root, size, workers)
    begin = time.perf_counter()
    while not len(next(batches)) or time.perf_counter() < begin + WARM_UP_S:
        pass
    begin, busy, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() < begin + seconds:
        images += len(next(batches))
    took = time.perf_counter() - begin
    return Speed(images / took, (_cpu_seconds() - busy) / images * 1000, _mebibytes())


def measure_resume(root: Path, *, size: int, workers: int) -> float:
    """Seconds from opening the dataset to the first batch, in the third epoch."""
    begin = time.perf_counter()
    shards = open_shards(root)
    config = DataConfig(shards=str(root), image_size=size, workers=workers)
    position = int(2.7 * shards.count) // BATCH * BATCH
    with Stream(shards, config=config, seed=0) as stream:
        next(
            stream.batches(
                images_seen=position, batch_size=BATCH, micro_batch_size=BATCH, rank=0, ranks=1
            )
        )
        return time.perf_counter() - begin


def measure_order() -> float:
    """Seconds to locate 256 images in the third epoch of ImageNet."""
    sizes = [2048] * (IMAGENET // 2048) + [IMAGENET % 2048]
    order = Order(sizes, seed=0, streams=192, block=512)
    begin = time.perf_counter()
    order.locate(int(2.7 * IMAGENET) + np.arange(256))
    return time.perf_counter() - begin


class Packing(NamedTuple):
    """Packing compared with Pillow alone: ratios of rates per core, and of CPU time per image.

    `per_core` compares with one process, `at_once` with as many processes as there are workers.
    """

    per_core: float
    at_once: float
    cpu: float


def measure_packing(photos: Path, out: Path, *, size: int, workers: int, rounds: int) -> Packing:
    """Medians over rounds; in each, Pillow is timed before and after the packing."""
    paths = sorted(photos.rglob("*.JPEG"))
    some = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:BY_HAND]]
    command = [sys.executable, "-m", "data.pack", str(photos), str(out), "--format", "jpg"]
    found = []
    with get_context("fork").Pool(workers) as pool:
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            before = _by_hand(some, size)
            begin = _clocks()
            subprocess.run([*command, "--size", str(size), "--workers", str(workers)], check=True)
            packed = (_clocks() - begin) / len(paths)
            wall, cpu = (before + _by_hand(some, size)) / 2 / packed
            at_once = np.mean(pool.starmap(_by_hand, workers * [(some, size)], chunksize=1), axis=0)
            found.append((wall / workers, at_once[0] / workers / packed[0], 1 / cpu))
    return Packing(*np.median(found, axis=0))


def _repeated(photos: Path, into: Path) -> Path:
    """A folder with each photograph `REPEATS` times.

    So that the start of a packing, and permuting the small blocks of a small set, weigh little.
    """
    for path in sorted(photos.rglob("*.JPEG")):
        for i in range(REPEATS):
            link = into / path.parent.name / f"{i}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return into


def _by_hand(paths: list[Path], size: int) -> np.ndarray:
    """Seconds of wall and CPU time (2,) per image, for one process with Pillow alone."""
    begin = _clocks()
    for path in paths:
        _pack_by_hand(path, size, PackConfig(size=size).quality)
    return (_clocks() - begin) / len(paths)


def _clocks() -> np.ndarray:
    """Wall time, and CPU time of this process and its finished children: seconds (2,)."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def _pack_by_hand(path: Path, size: int, quality: int) -> bytes:
    with Image.open(path) as image:
        crop = center_crop(image.convert("RGB"), size=size)
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family())


def _mebibytes() -> float:
    """Memory of all processes; shared memory counts once."""
    return sum(process.memory_full_info().pss for process in _family()) / 2**20


def _in_a_process(*arguments: object) -> list[float]:
    command = [sys.executable, "-m", "bench.data", "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results: list[float] = json.loads(done.stdout.splitlines()[-1])
    return results


def _one(what: str, root: str, size: str, workers: str, seconds: str) -> int:
    """The measuring process: print its results and exit, with all of its children."""
    if what == "resume":
        results = [measure_resume(Path(root), size=int(size), workers=int(workers))]
    else:
        results = list(
            measure(what, Path(root), size=int(size), workers=int(workers), seconds=float(seconds))
        )
    print(json.dumps(results), flush=True)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(0)


def _compare(root: Path, *, size: int, workers: int, seconds: float, rounds: int) -> None:
    names = [name for name in SYSTEMS if "MosaicML" not in name or find_spec("streaming")]
    if find_spec("streaming"):
        mosaicml_copy(root)
    runs: dict[str, list[Speed]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(Speed(*_in_a_process(name, root, size, workers, seconds)))
    medians = {name: Speed(*map(median, zip(*runs[name], strict=True))) for name in names}
    print(f"\n{size} px, {workers} workers, median of {rounds} rounds of {seconds:g} s\n")
    print("| system | images/s | ours is | CPU ms per image | of ours | memory MiB |")
    print("|---|---|---|---|---|---|")
    ours = medians["ours"]
    for name, speed in medians.items():
        pairs = zip(runs["ours"], runs[name], strict=True)
        ratio = median(mine.images_s / theirs.images_s for mine, theirs in pairs)
        print(
            f"| {name} | {speed.images_s:.0f} | {ratio:.2f} x | {speed.cpu_ms:.3f} | "
            f"{speed.cpu_ms / ours.cpu_ms:.2f} x | {speed.mib:.0f} |",
            flush=True,
        )


def _run(options: argparse.Namespace, scratch: Path) -> None:
    photos = options.photos or scratch / "photos"
    if not options.photos:
        make_photos(photos, images=options.images, classes=1000)
    many = _repeated(photos, scratch / "many")
    for size in options.sizes:
        root = scratch / f"packed-{size}"
        packing = measure_packing(
            many, root, size=size, workers=options.workers, rounds=options.rounds
        )
        print(
            f"packing at {size} px: {packing.per_core:.2f} x cores x the rate of one process with "
            f"Pillow, {packing.at_once:.2f} x that of {options.workers} such processes at once, "
            f"{packing.cpu:.2f} x its CPU time per image",
            flush=True,
        )
        _compare(
            root,
            size=size,
            workers=options.workers,
            seconds=options.seconds,
            rounds=options.rounds,
        )
        cold = [
            _in_a_process("resume", root, size, options.workers, 0)[0]
            for _ in range(options.rounds)
        ]
        print(f"\nfirst batch of {BATCH} after a cold resume: {median(cold):.2f} s", flush=True)
    print(f"locating 256 images in ImageNet's third epoch: {measure_order() * 1000:.0f} ms")


def main() -> int:
    """Run `python -m bench.data`; returns the exit status."""
    if sys.argv[1:2] == ["--one"]:
        return _one(*sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    add = parser.add_argument
    add("--photos", type=Path, help="a folder of images (default: make them)")
    add("--images", type=int, default=3000, help="images to make (default: %(default)s)")
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=[128, 256],
        help="sides of the packed images in pixels (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes of each system (default: one for each CPU, here %(default)s)",
    )
    add("--seconds", type=float, default=5.0, help="length of a round (default: %(default)s)")
    add("--rounds", type=int, default=3, help="rounds of each system (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        _run(options, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
