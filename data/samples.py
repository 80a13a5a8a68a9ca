"""From image numbers to pixels: order -> shard -> checked bytes -> decoded, cropped, flipped.

This is what a worker process runs, so torch stays out of it: a worker starts in a third of a
second and takes some 60 MB.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data.blobs import BadSampleError, Blob, Blobs
from data.fetch import FetchConfig, is_local
from data.manifest import Shards
from data.order import Ints, Order
from data.transforms import (
    UNDECODABLE,
    Pixels,
    center_crop,
    decode,
    decode_into,
    flips,
    random_crop,
    write,
)

_HUGE = 1 << 22  # bytes from which numpy asks for huge pages: a tenth of decoding can be TLB misses
_REQUESTS = 16  # under way at once in a process, where each costs a network's round trip


@dataclass(frozen=True, kw_only=True)
class DataConfig(FetchConfig):
    """Which shards to stream, how to mix them, and what becomes of each image.

    `streams` and `block` fix the order, together with the seed and the dataset: keep them for a
    whole run. `prefetch_mb` bounds the decoded images that wait; `max_bad` the share of images
    that may be damaged before the trainer stops the run.
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
        self._blobs = Blobs(shards, config=config)
        remote = not is_local(shards.root)
        self._threads = ThreadPoolExecutor(_REQUESTS) if remote else None
        self._scratch = np.empty(max(3 * config.image_size**2, _HUGE), dtype=np.uint8)
        self._is_final = config.crop == "center" and fixed == config.image_size

    def load(self, request: Request, *, out: Pixels) -> Loaded:
        """Fill `out` (n, H, W, 3) with the requested images.

        Raises:
            ValueError: a shard is not what its index says, or a whole block is damaged.
            OSError: a shard cannot be read.
        """
        numbers = np.asarray(request.numbers, dtype=np.int64)
        place = self._rows(numbers) if request.once else self.order.locate(numbers)[1:]
        rows = zip(*(column.tolist() for column in place), strict=True)
        begun = [self._begin(shard, row) for shard, row in rows]
        draws = self._draws(request, numbers)
        labels = np.empty(len(numbers), dtype=np.int64)
        bad = []
        for i, (blob, draw) in enumerate(zip(begun, draws, strict=True)):
            try:
                labels[i] = self._put(blob(), draw, out[i])
            except BadSampleError as error:
                if request.once:
                    raise ValueError(f"{error}; a validation split must be whole") from None
                bad.append(str(error))
                labels[i] = self._stand_in(draw, out[i], str(error))
        return Loaded(labels, tuple(bad))

    def close(self) -> None:
        """Close the shards' files."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        self._blobs.close()

    def _rows(self, numbers: Ints) -> tuple[Ints, Ints]:
        shard = np.searchsorted(self._ends, numbers, side="right")
        return shard, numbers - self._ends[shard] + np.asarray(self.shards.sizes)[shard]

    def _draws(self, request: Request, numbers: Ints) -> list["_Draw"]:
        if request.once:
            return [_Draw(int(number), flip=False, crop="center") for number in numbers]
        flip = flips(seed=self.seed, numbers=numbers) & self.config.flip
        return [
            _Draw(number, flip=mirrored, crop=self.config.crop)
            for number, mirrored in zip(numbers.tolist(), flip.tolist(), strict=True)
        ]

    def _begin(self, shard: int, row: int) -> Callable[[], Blob]:
        """Start reading a stored image; what is returned waits for it."""
        if self._threads:
            return self._threads.submit(self._blobs.read, shard, row).result
        return partial(self._blobs.read, shard, row)

    def _stand_in(self, draw: "_Draw", out: Pixels, why: str) -> int:
        """The next good image of the same block takes the place of a bad one."""
        for other in self.order.alternatives(draw.number):
            _, shard, row = self.order.locate([other])
            try:
                return self._put(self._blobs.read(int(shard[0]), int(row[0])), draw, out)
            except BadSampleError:
                continue  # it is counted when its own number comes
        raise ValueError(f"{why}; and no image of its block of the order is good")

    def _put(self, blob: Blob, draw: "_Draw", out: Pixels) -> int:
        """Decode an image into `out`; its label."""
        try:
            if self._is_final:  # cropped when it was packed
                decode_into(blob.content, mirrored=draw.flip, out=out, scratch=self._scratch)
            else:
                pixels = self._crop(Image.fromarray(decode(blob.content)), draw)
                write(pixels[:, ::-1] if draw.flip else pixels, out=out)
        except UNDECODABLE as error:
            raise BadSampleError(f"{blob.where} cannot be decoded: {error}") from None
        return blob.label

    def _crop(self, image: Image.Image, draw: "_Draw") -> Pixels:
        size = self.config.image_size
        if draw.crop == "random":
            return random_crop(image, size=size, seed=self.seed, number=draw.number)
        return center_crop(image, size=size)


class _Draw(NamedTuple):
    """What was drawn for one image number."""

    number: int
    flip: bool
    crop: Literal["center", "random"]
