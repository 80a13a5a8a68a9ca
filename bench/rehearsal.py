"""ImageNet's way through the data layer, rehearsed on photographs that anyone has.

    python -m bench.rehearsal [--images 3000] [--batch 2]

Makes a photo set in ImageNet's layout (1000 class directories), packs it at 64 pixels, verifies
every checksum, streams an epoch on three ranks, reads the shards with plain webdataset, and trains
the published 64-pixel model on a batch for one step. Takes 8 GB of memory and some minutes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import webdataset as wds

from bench.photos import make_photos
from data.pack import main as pack
from data.shards import Shards, open_shards, verify
from data.stream import DataConfig, Stream
from trainer.adm.diffusion import DiffusionConfig
from trainer.adm.objective import Denoise
from trainer.adm.timesteps import UniformTimesteps
from trainer.adm.unet import UNet, UNetConfig

CLASSES, SIZE, RANKS = 1000, 64, 3

MODEL = UNetConfig(
    image_size=SIZE,
    channels=192,
    channel_mult=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
    head_channels=64,
    qkv="new",
    dropout=0.1,
    num_classes=CLASSES,
    checkpoint=True,
)


def stream_an_epoch(shards: Shards) -> str:
    """All ranks' images of the first epoch, each once."""
    config = DataConfig(shards=shards.root, image_size=SIZE, flip=False)
    epoch = shards.count // config.streams * config.streams
    seen: list[bytes] = []
    for rank in range(RANKS):
        with Stream(shards, config=config, seed=0) as stream:
            batches = stream.batches(
                images=0, batch=config.streams, micro_batch=32, rank=rank, ranks=RANKS
            )
            for batch in islice(batches, epoch // RANKS // 32):
                seen += [image.numpy().tobytes() for image in batch.images]
            assert stream.bad == 0
    assert len(seen) == epoch and len(set(seen)) == epoch
    return f"{epoch} of {shards.count} images in the epoch, each once, on {RANKS} ranks"


def read_with_webdataset(shards: Shards) -> str:
    """What a stranger's reader finds."""
    urls = [str(Path(shards.root) / shard.tar) for shard in shards.shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("torchrgb8").to_tuple("png", "cls")
    labels = [label for image, label in dataset if image.shape == (3, SIZE, SIZE)]
    assert len(labels) == shards.count and set(labels) == set(range(CLASSES))
    return f"{len(labels)} images, {len(set(labels))} classes"


def train_a_step(shards: Shards, batch: int) -> str:
    """One AdamW step of the published model; the loss before and after on the same batch."""
    torch.manual_seed(0)
    net = UNet(MODEL)
    denoise = Denoise(
        DiffusionConfig(schedule="cosine"),
        timesteps=UniformTimesteps(1000, seed=0),
        seed=0,
        class_conditional=True,
    )
    config = DataConfig(shards=shards.root, image_size=SIZE, workers=1)
    with Stream(shards, config=config, seed=0) as stream:
        one = next(stream.batches(images=0, batch=batch, micro_batch=batch, rank=0, ranks=1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.0)
    losses = []
    for _ in range(2):
        loss = denoise(net, one.images, one.labels, one.numbers)["loss"].mean()
        losses.append(loss.item())
        if len(losses) == 1:
            loss.backward()
            optimizer.step()
    parameters = sum(p.numel() for p in net.parameters())
    return f"{parameters:,} parameters, loss {losses[0]:.4f} -> {losses[1]:.4f}"


def main() -> int:
    """The command line of `python -m bench.rehearsal`."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos, out = Path(scratch, "photos"), Path(scratch, "packed")
        _say("photos", lambda: make_photos(photos, images=options.images, classes=CLASSES))
        _say("pack", lambda: pack([str(photos), str(out), "--size", str(SIZE)]))
        _say("verify", lambda: verify(out, full=True) or "every checksum is right")
        shards = open_shards(out)
        _say("stream", lambda: stream_an_epoch(shards))
        _say("plain webdataset", lambda: read_with_webdataset(shards))
        _say("train a step", lambda: train_a_step(shards, options.batch))
    return 0


def _say(what: str, work: Callable[[], object]) -> None:
    begin = time.perf_counter()
    found = work() or "done"
    print(f"{what}: {found} ({time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
