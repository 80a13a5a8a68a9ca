"""From image numbers to pixels: order -> shard -> checked bytes -> decoded, cropped, flipped.

This is what a worker process runs, so torch stays out of it: a worker starts in a third of a
second and takes some 60 MB.
"""

import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.cache import CachedReader
from data.fetch import FetchConfig, Reader, is_local
from data.order import Ints, Order
from data.shards import Shards
from data.tars import HEADER, Index
from data.transforms import (
    UNDECODABLE,
    Pixels,
    center_crop,
    decode,
    flipped,
    random_crop,
    to_chw,
)

_REQUESTS = 16  # under way at once in a process, where each costs a network's round trip


@dataclass(frozen=True, kw_only=True)
class DataConfig(FetchConfig):
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
        super().__post_init__()
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
        self._reader = open_reader(shards, config)
        remote = not is_local(shards.root)
        self._threads = ThreadPoolExecutor(_REQUESTS) if remote else None

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
        begun = [self._begin(int(shard), int(row)) for shard, row in zip(*place, strict=True)]
        for i, (number, sample) in enumerate(zip(numbers, begun, strict=True)):
            try:
                labels[i] = self._put(sample(), int(number), request.once, out[i])
            except BadSampleError as error:
                if request.once:
                    raise ValueError(f"{error}; a validation split must be whole") from None
                bad.append(str(error))
                labels[i] = self._stand_in(int(number), out[i], str(error))
        return Loaded(labels, tuple(bad))

    def close(self) -> None:
        """Close the shards' files."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def _rows(self, numbers: Ints) -> tuple[Ints, Ints]:
        shard = np.searchsorted(self._ends, numbers, side="right")
        return shard, numbers - self._ends[shard] + np.asarray(self.shards.sizes)[shard]

    def _begin(self, shard: int, row: int) -> Callable[[], "_Sample"]:
        """Start reading a sample; what is returned waits for it."""
        if self._threads:
            return self._threads.submit(self._read, shard, row).result
        return partial(self._read, shard, row)

    def _stand_in(self, number: int, out: Pixels, why: str) -> int:
        """The next good image of the same block takes the place of a bad one."""
        for other in self.order.alternatives(number):
            _, shard, row = self.order.locate([other])
            try:
                return self._put(self._read(int(shard[0]), int(row[0])), number, False, out)
            except BadSampleError:
                continue  # it is counted when its own number comes
        raise ValueError(f"{why}; and no image of its block of the order is good")

    def _put(self, sample: "_Sample", number: int, once: bool, out: Pixels) -> int:
        """Decode a sample into `out`; its label."""
        try:
            pixels = self._crop(decode(sample.blob), number, once)
            flip = self.config.flip and not once and flipped(seed=self.seed, number=number)
            to_chw(pixels, flip=flip, out=out)
        except UNDECODABLE as error:
            why = f"{sample.where} cannot be decoded: {error}"
            raise BadSampleError(why) from None
        return sample.label

    def _crop(self, pixels: Pixels, number: int, once: bool) -> Pixels:
        size = self.config.image_size
        if self.config.crop == "random" and not once:
            image = Image.fromarray(pixels)
            return random_crop(image, size=size, seed=self.seed, number=number)
        if self.shards.image_size == size:
            return pixels
        return center_crop(Image.fromarray(pixels), size=size)

    def _read(self, shard: int, row: int) -> "_Sample":
        """A sample whose header, size and checksum agree with the index."""
        if shard not in self._indexes:
            self._indexes[shard] = self._index(shard)
        entry = self._indexes[shard][row]
        try:
            return self._checked(shard, entry)
        except (BadSampleError, ValueError):
            # Perhaps only the way here was bad: a cache, a stale file handle, a flipped bit.
            self._reader.forget(self._tar(shard), **_extent(entry))
        try:
            return self._checked(shard, entry)
        except BadSampleError:
            self._demand_others_intact(shard, row)
            raise

    def _index(self, shard: int) -> Index:
        if is_local(self.shards.root):
            return self.shards.index(shard)
        content = self._reader.whole(self.shards.shards[shard].index)
        return self.shards.parse_index(shard, content)

    def _checked(self, shard: int, entry: NDArray[np.void]) -> "_Sample":
        raw = self._reader.read(self._tar(shard), **_extent(entry))
        tar, size = f"{self.shards.root}/{self._tar(shard)}", int(entry["size"])
        try:
            info = tarfile.TarInfo.frombuf(raw[:HEADER], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{tar}: no tar header at byte {entry['offset'] - HEADER}, where the index has "
                f"one ({error}); the shard is damaged: run `python -m data.shards verify --full`"
            ) from None
        if info.size != size:
            raise ValueError(
                f"{tar}: {info.name} has {info.size} bytes, the index says {size}; "
                "the shard was damaged or replaced: run `python -m data.shards verify --full`"
            )
        where = f"{tar}: {info.name}"
        if zlib.crc32(raw[HEADER:]) != entry["crc32"]:
            raise BadSampleError(f"{where} does not have the checksum of its index")
        return _Sample(where, raw[HEADER:], int(entry["label"]))

    def _demand_others_intact(self, shard: int, row: int) -> None:
        """Tell one damaged image from a shard that is another one of the same name."""
        index = self._indexes[shard]
        for other in {0, len(index) // 2, len(index) - 1} - {row}:
            try:
                self._checked(shard, index[other])
            except BadSampleError:
                raise ValueError(
                    f"{self.shards.root}/{self._tar(shard)}: several images do not have their "
                    "checksums; the shard was replaced or is damaged throughout: run "
                    "`python -m data.shards verify --full`"
                ) from None

    def _tar(self, shard: int) -> str:
        return self.shards.shards[shard].tar


class _Sample(NamedTuple):
    """A stored image: shard and key, the file's bytes, its label."""

    where: str
    blob: bytes
    label: int


def open_reader(shards: Shards, config: FetchConfig) -> Reader | CachedReader:
    """The way to the bytes of a dataset, through the node's cache if there is one to use.

    Raises:
        ValueError: a pipe that only reads forward, and no cache.
    """
    reader = Reader(shards.root, config=config)
    if config.cache and not is_local(shards.root):
        return CachedReader(
            reader,
            root=Path(config.cache) / shards.fingerprint[:16],
            tars={shard.tar: shard.bytes for shard in shards.shards},
            bound=int(config.cache_gb * 2**30),
        )
    if not reader.seeks:
        raise ValueError(
            f"data.shards = {shards.root} cannot read from the middle of a file: put {{first}} and "
            "{last} into the command, or give the node a data.cache"
        )
    return reader


def _extent(entry: NDArray[np.void]) -> dict[str, int]:
    """Header and payload of a sample in its tar."""
    return {"first": int(entry["offset"]) - HEADER, "size": int(entry["size"]) + HEADER}
