"""All steps from ImageNet to training, on photographs that scikit-learn includes.

    python -m bench.rehearsal [--images 3000] [--batch 2]

Makes a photo set in ImageNet's layout (1000 class directories), packs it at 64 pixels, verifies
every checksum, streams an epoch on three ranks, reads the shards with plain webdataset, and trains
the published 64-pixel model on a batch for one step. Takes 10 GB of memory and of disk.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import webdataset as wds

from bench.photos import make_photos
from data.config import DataConfig
from data.dataset import Shards, open_shards, verify
from data.pack import main as pack
from data.stream import Stream

CLASSES, SIZE, RANKS = 1000, 64, 3


def stream_an_epoch(shards: Shards) -> str:
    """All ranks' images of the first epoch, each once."""
    config = DataConfig(shards=shards.root, image_size=SIZE, flip=False)
    epoch = shards.count // config.streams * config.streams
    seen: list[bytes] = []
    for rank in range(RANKS):
        with Stream(shards, config=config, seed=0) as stream:
            batches = stream.batches(
                images_seen=0,
                batch_size=config.streams,
                micro_batch_size=32,
                rank=rank,
                ranks=RANKS,
            )
            for batch in islice(batches, epoch // RANKS // 32):
                seen += [image.numpy().tobytes() for image in batch.images]
            assert stream.bad == 0
    assert len(seen) == epoch and len(set(seen)) == epoch
    return f"{epoch} of {shards.count} images in the epoch, each once, on {RANKS} ranks"


def read_with_webdataset(shards: Shards) -> str:
    """The dataset as plain webdataset reads it."""
    urls = [str(Path(shards.root) / shard.tar) for shard in shards.shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("torchrgb8").to_tuple("png", "cls")
    labels = [label for image, label in dataset if image.shape == (3, SIZE, SIZE)]
    assert len(labels) == shards.count and set(labels) == set(range(CLASSES))
    return f"{len(labels)} images, {len(set(labels))} classes"


def train_a_step(shards: Shards, *, run: Path, batch: int) -> str:
    """One step of the published 64-pixel model, by the command that trains it."""
    changes = (
        f'data.shards = "{shards.root}"',
        f"training.batch = {batch}",
        f"training.images = {batch}",
        "training.micro_batch = 1",
        'training.precision = "fp32"',
        "model.checkpoint = true",
    )
    command = [sys.executable, "-m", "trainer.train", "imagenet64", "--run", str(run)]
    for change in changes:
        command += ["--set", change]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run / "log.txt").read_text().splitlines()
    return "; ".join(line.partition("  ")[2] for line in lines[:2])


def main() -> int:
    """Run `python -m bench.rehearsal`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__)
    parser.add_argument(
        "--images", type=int, default=3000, help="photos to make (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=2, help="images of the training step (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos, out = Path(scratch, "photos"), Path(scratch, "packed")
        _report("photos", lambda: make_photos(photos, images=options.images, classes=CLASSES))
        _report("pack", lambda: pack([str(photos), str(out), "--size", str(SIZE)]))
        _report("verify", lambda: verify(out, full=True) or "all checksums match")
        shards = open_shards(out)
        _report("stream", lambda: stream_an_epoch(shards))
        _report("plain webdataset", lambda: read_with_webdataset(shards))
        _report(
            "train a step",
            lambda: train_a_step(shards, run=Path(scratch, "run"), batch=options.batch),
        )
    return 0


def _report(what: str, work: Callable[[], object]) -> None:
    begin = time.perf_counter()
    found = work() or "done"
    print(f"{what}: {found} ({time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
