"""From image numbers to pixels: order -> shard -> checked bytes -> decoded, cropped, flipped.

This is what a worker process runs, so torch stays out of it: a worker starts in a third of a
second and takes some 60 MB.
"""

import os
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.order import Ints, Order
from data.shards import HEADER, Index, Shards
from data.transforms import (
    UNDECODABLE,
    Pixels,
    center_crop,
    decode,
    flipped,
    random_crop,
    to_chw,
)

_OPEN_FILES = 256  # a common limit is 1024 for the whole process


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards to stream, how to mix them, and what becomes of each image.

    `streams` and `block` fix the order, together with the seed and the dataset: keep them for a
    whole run. `prefetch_mb` bounds the decoded images that wait; `max_bad` the share of images
    that may be damaged before the run stops.
    """

    shards: str
    image_size: int
    streams: int = 192
    block: int = 512
    workers: int = 2
    flip: bool = True
    crop: Literal["center", "random"] = "center"
    prefetch_mb: int = 256
    max_bad: float = 0.001

    def __post_init__(self) -> None:
        for name in ("image_size", "streams", "block", "prefetch_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} = {getattr(self, name)}: must be at least 1")
        if self.workers < 0:
            raise ValueError(f"data.workers = {self.workers}: 0 (decode in the trainer) or more")
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop = {self.crop!r}: choose 'center' or 'random'")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"data.max_bad = {self.max_bad}: a share between 0 and 1")


class BadSampleError(Exception):
    """One stored image that is damaged: its shard, key and why."""


class Request(NamedTuple):
    """Images to load: those of the endless training order, or of one pass in packing order."""

    numbers: range
    once: bool


class Loaded(NamedTuple):
    """What was loaded besides pixels: int64 labels (n,), and a line for each bad sample."""

    labels: Ints
    bad: tuple[str, ...]


class Samples:
    """Random access to the images of a run by their numbers.

    Raises:
        ValueError: too few images, or shards packed for another size than `config.image_size`.
    """

    def __init__(self, shards: Shards, *, config: DataConfig, seed: int) -> None:
        fixed = shards.image_size
        if config.crop == "center" and fixed not in (None, config.image_size):
            raise ValueError(
                f"data.image_size = {config.image_size}, but {shards.root} was packed at {fixed}: "
                f"set it to {fixed}, or pack again with --size {config.image_size}"
            )
        self.shards, self.config, self.seed = shards, config, seed
        self.order = Order(shards.sizes, seed=seed, streams=config.streams, block=config.block)
        self._ends = np.cumsum(shards.sizes)
        self._indexes: dict[int, Index] = {}
        self._files: OrderedDict[int, int] = OrderedDict()

    def load(self, request: Request, *, out: Pixels) -> Loaded:
        """Fill `out` (n, 3, H, W) with the requested images.

        Raises:
            ValueError: a shard is not what its index says, or a whole block is damaged.
            OSError: a shard cannot be read.
        """
        numbers = np.asarray(request.numbers, dtype=np.int64)
        place = self._rows(numbers) if request.once else self.order.locate(numbers)[1:]
        labels = np.empty(len(numbers), dtype=np.int64)
        bad = []
        for i, (number, shard, row) in enumerate(zip(numbers, *place, strict=True)):
            try:
                labels[i] = self._load(int(number), int(shard), int(row), request.once, out[i])
            except BadSampleError as error:
                if request.once:
                    raise ValueError(f"{error}; a validation split must be whole") from None
                bad.append(str(error))
                labels[i] = self._stand_in(int(number), out[i], str(error))
        return Loaded(labels, tuple(bad))

    def close(self) -> None:
        """Close the shards' files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _rows(self, numbers: Ints) -> tuple[Ints, Ints]:
        shard = np.searchsorted(self._ends, numbers, side="right")
        return shard, numbers - self._ends[shard] + np.asarray(self.shards.sizes)[shard]

    def _stand_in(self, number: int, out: Pixels, why: str) -> int:
        """The next good image of the same block takes the place of a bad one."""
        for other in self.order.alternatives(number):
            _, shard, row = self.order.locate([other])
            try:
                return self._load(number, int(shard[0]), int(row[0]), False, out)
            except BadSampleError:
                continue  # it is counted when its own number comes
        raise ValueError(f"{why}; and no image of its block of the order is good")

    def _load(self, number: int, shard: int, row: int, once: bool, out: Pixels) -> int:
        key, blob, label = self._read(shard, row)
        try:
            pixels = self._crop(decode(blob), number, once)
            flip = self.config.flip and not once and flipped(seed=self.seed, number=number)
            to_chw(pixels, flip=flip, out=out)
        except UNDECODABLE as error:
            raise BadSampleError(f"{self._tar(shard)}: {key} cannot be decoded: {error}") from None
        return label

    def _crop(self, pixels: Pixels, number: int, once: bool) -> Pixels:
        size = self.config.image_size
        if self.config.crop == "random" and not once:
            image = Image.fromarray(pixels)
            return random_crop(image, size=size, seed=self.seed, number=number)
        if self.shards.image_size == size:
            return pixels
        return center_crop(Image.fromarray(pixels), size=size)

    def _read(self, shard: int, row: int) -> tuple[str, bytes, int]:
        """Key, checked payload and label of one sample."""
        if shard not in self._indexes:
            self._indexes[shard] = self.shards.index(shard)
        entry = self._indexes[shard][row]
        key, blob = self._payload(shard, entry)
        if zlib.crc32(blob) == entry["crc32"]:
            return key, blob, int(entry["label"])
        self._demand_others_intact(shard, row)
        raise BadSampleError(f"{self._tar(shard)}: {key} does not have the checksum of its index")

    def _payload(self, shard: int, entry: NDArray[np.void]) -> tuple[str, bytes]:
        """Name and payload, where header and size agree with the index."""
        offset, size = int(entry["offset"]), int(entry["size"])
        raw = os.pread(self._file(shard), HEADER + size, offset - HEADER)
        try:
            info = tarfile.TarInfo.frombuf(raw[:HEADER], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{self._tar(shard)}: no tar header at byte {offset - HEADER}, where the index has "
                f"one ({error}); the shard is damaged: run `python -m data.shards verify`"
            ) from None
        if info.size != size or len(raw) != HEADER + size:
            raise ValueError(
                f"{self._tar(shard)}: {info.name} has {info.size} bytes, the index says {size}; "
                "the shard was damaged or replaced: run `python -m data.shards verify`"
            )
        return info.name, raw[HEADER:]

    def _demand_others_intact(self, shard: int, row: int) -> None:
        """Tell one damaged image from a shard that is another one of the same name."""
        index = self._indexes[shard]
        others = [i for i in (0, len(index) // 2, len(index) - 1) if i != row]
        if any(zlib.crc32(self._payload(shard, index[i])[1]) != index[i]["crc32"] for i in others):
            raise ValueError(
                f"{self._tar(shard)}: several images do not have their checksums; the shard was "
                "replaced or is damaged throughout: run `python -m data.shards verify --full`"
            )

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._tar(shard), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _tar(self, shard: int) -> Path:
        return Path(self.shards.root) / self.shards.shards[shard].tar
