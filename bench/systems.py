"""The systems that `bench.data` compares: endless iterators over served batches.

All read the same JPEG files, decode them, mirror half of them, and yield uint8 (B, 3, H, W) tensors
in the training process, with the same number of worker processes. The pixels of all lie as they are
decoded, channels last, and are mirrored in the quickest way: turning them is left to the device.
Bare decoding yields only how many images were decoded, as a range.
"""

import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Process, Value
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.dataset import open_shards
from data.packing.tars import scan_tar
from data.stream import Stream

BATCH = 64
# Copies of the images in MDS shards, so that no epoch ends during the measurement.
_MDS_COPIES = 4

Decode = Callable[[bytes], np.ndarray]
Batches = Iterator[Tensor | Sequence[int]]


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
            yield batch.images


def decoder(root: Path, size: int, workers: int) -> Batches:
    """Calls of simplejpeg alone, on files in memory; the pixels are discarded."""
    return _in_processes(root, size, workers, lambda pixels, out: None)


def decoding(root: Path, size: int, workers: int) -> Batches:
    """Decoding alone: files in memory to batches, half of the images mirrored."""
    return _in_processes(root, size, workers, lambda pixels, out: out.copy_(_finished(pixels)))


def _in_processes(
    root: Path, size: int, workers: int, use: Callable[[np.ndarray, Tensor], object]
) -> Batches:
    done = Value("q", 0)
    stored = stored_images(root)

    def work() -> None:
        torch.set_num_threads(1)
        batch = torch.empty((BATCH, size, size, 3), dtype=torch.uint8)
        memory = np.empty(3 * size * size, dtype=np.uint8)
        while True:
            for i in range(0, len(stored), BATCH):
                for content, out in zip(stored[i : i + BATCH], batch, strict=False):
                    use(simplejpeg.decode_jpeg(content, colorspace="RGB", buffer=memory), out)
                with done.get_lock():
                    done.value += len(stored[i : i + BATCH])

    for _ in range(workers):
        Process(target=work, daemon=True).start()
    seen = 0
    while True:
        time.sleep(0.05)
        now = done.value
        yield range(now - seen)
        seen = now


def by_pillow(content: bytes) -> np.ndarray:
    """Uint8 (H, W, 3) by Pillow, as webdataset and MosaicML Streaming decode by default."""
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def by_simplejpeg(content: bytes) -> np.ndarray:
    """Uint8 (H, W, 3) by our decoder."""
    return simplejpeg.decode_jpeg(content, colorspace="RGB")


def webdataset(root: Path, size: int, workers: int, *, decode: Decode) -> Batches:
    """webdataset's own pipeline."""
    import webdataset as wds  # seconds of import that the others should not pay

    urls = [str(root / shard.tar) for shard in open_shards(root).shards]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda content: _finished(decode(content)), int)
        .batched(BATCH)
        .repeat()
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield images.permute(0, 3, 1, 2)


def mosaicml(root: Path, size: int, workers: int, *, decode: Decode) -> Batches:
    """MosaicML Streaming with torch's DataLoader."""
    from streaming import StreamingDataset  # not a dependency of this project

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return _finished(decode(sample["image"])), int(sample["label"])

    local = mosaicml_copy(root)
    images = Images(local=str(local), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(
        images, batch_size=BATCH, num_workers=workers, persistent_workers=True
    )
    while True:
        for batch, _ in loader:
            yield batch.permute(0, 3, 1, 2)


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


def _finished(pixels: np.ndarray) -> Tensor:
    image = torch.from_numpy(pixels)
    return image.flip(1) if random.random() < 0.5 else image


SYSTEMS: dict[str, Callable[[Path, int, int], Batches]] = {
    "simplejpeg alone": decoder,
    "pure decoding into batches": decoding,
    "ours": ours,
    "webdataset, Pillow": partial(webdataset, decode=by_pillow),
    "webdataset, simplejpeg": partial(webdataset, decode=by_simplejpeg),
    "MosaicML Streaming, Pillow": partial(mosaicml, decode=by_pillow),
    "MosaicML Streaming, simplejpeg": partial(mosaicml, decode=by_simplejpeg),
}
