"""The systems that `bench.data` compares: endless iterators over the sizes of served batches.

All read the same JPEG files, decode them, mirror half of them, and yield uint8 (B, 3, H, W) tensors
in the training process, with the same number of worker processes.
"""

import io
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing import Process, Value
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data.config import DataConfig
from data.dataset import open_shards
from data.packing.tars import scan_tar
from data.stream import Stream

BATCH = 64
# Copies of the images in MDS shards, so that no epoch ends during the measurement.
_MDS_COPIES = 2

Batches = Iterator[int]


def stored_images(root: Path) -> list[bytes]:
    """The image files in a packed dataset, in order."""
    stored = []
    for tar in sorted(root.glob("*.tar")):
        with tar.open("rb") as file:
            for sample in scan_tar(tar):
                file.seek(sample.offset)
                stored.append(file.read(sample.size))
    return stored


def ours(root: Path, size: int, workers: int) -> Batches:
    """This repository's stream."""
    config = DataConfig(shards=str(root), image_size=size, workers=workers)
    with Stream(open_shards(root), config=config, seed=0) as stream:
        for batch in stream.batches(
            images_seen=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, ranks=1
        ):
            yield len(batch.images)


def decoder(root: Path, size: int, workers: int) -> Batches:
    """Calls of simplejpeg alone, on files in memory; the pixels are discarded."""

    def decode(content: bytes, out: np.ndarray) -> None:
        simplejpeg.decode_jpeg(content, colorspace="RGB")

    return _in_processes(root, size, workers, decode)


def decoding(root: Path, size: int, workers: int) -> Batches:
    """Decoding alone: files in memory to batches, half of the images mirrored."""

    def decode(content: bytes, out: np.ndarray) -> None:
        out[:] = _mirrored_or_not(simplejpeg.decode_jpeg(content, colorspace="RGB"))

    return _in_processes(root, size, workers, decode)


def _in_processes(
    root: Path, size: int, workers: int, decode: Callable[[bytes, np.ndarray], None]
) -> Batches:
    done = Value("q", 0)
    stored = stored_images(root)

    def work() -> None:
        batch = np.empty((BATCH, 3, size, size), dtype=np.uint8)
        while True:
            for i in range(0, len(stored), BATCH):
                for content, out in zip(stored[i : i + BATCH], batch, strict=False):
                    decode(content, out)
                with done.get_lock():
                    done.value += len(stored[i : i + BATCH])

    for _ in range(workers):
        Process(target=work, daemon=True).start()
    seen = 0
    while True:
        time.sleep(0.05)
        now = done.value
        yield now - seen
        seen = now


def webdataset_pillow(root: Path, size: int, workers: int) -> Batches:
    """webdataset's own pipeline, decoding with Pillow as it does by default."""
    return _webdataset(root, workers, lambda content: np.asarray(_pillow(content)))


def webdataset_simplejpeg(root: Path, size: int, workers: int) -> Batches:
    """webdataset's own pipeline with our decoder."""
    return _webdataset(
        root, workers, lambda content: simplejpeg.decode_jpeg(content, colorspace="RGB")
    )


def mosaicml(root: Path, size: int, workers: int) -> Batches:
    """MosaicML Streaming, decoding with Pillow as its own image columns do."""
    from streaming import StreamingDataset  # not a dependency of this project

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            sample = super().__getitem__(index)
            return _finish(np.array(_pillow(sample["image"]))), int(sample["label"])

    local = mosaicml_copy(root)
    images = Images(local=str(local), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(
        images, batch_size=BATCH, num_workers=workers, persistent_workers=True
    )
    while True:
        for batch, _ in loader:
            yield len(batch)


def mosaicml_copy(root: Path) -> Path:
    """The same images as MDS shards."""
    from streaming import MDSWriter  # not a dependency of this project

    local = root.with_name(f"{root.name}-mds")
    if not local.exists():
        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(local), columns=columns) as writer:
            for content in stored_images(root) * _MDS_COPIES:
                writer.write({"image": content, "label": 0})
    return local


SYSTEMS: dict[str, Callable[[Path, int, int], Batches]] = {
    "simplejpeg alone": decoder,
    "pure decoding into batches": decoding,
    "ours": ours,
    "webdataset, Pillow": webdataset_pillow,
    "webdataset, simplejpeg": webdataset_simplejpeg,
    "MosaicML Streaming": mosaicml,
}


def _webdataset(root: Path, workers: int, decode: Callable[[bytes], np.ndarray]) -> Batches:
    import webdataset as wds  # seconds of import that the others should not pay

    urls = [str(root / shard.tar) for shard in open_shards(root).shards]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda content: torch.from_numpy(_finish(decode(content))), int)
        .batched(BATCH)
        .repeat()
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)


def _pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _finish(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_mirrored_or_not(pixels))


def _mirrored_or_not(pixels: np.ndarray) -> np.ndarray:
    return (pixels[:, ::-1] if random.random() < 0.5 else pixels).transpose(2, 0, 1)
