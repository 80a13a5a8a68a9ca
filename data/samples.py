"""From image indices to pixels: order -> shard -> checked bytes -> decoded, cropped, flipped.

Worker processes run this, so it does not import torch: a worker starts in a third of a second and
takes some 60 MB.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data.config import DataConfig, is_local
from data.dataset import Shards
from data.mixture import Dataset, order_of
from data.order import Ints, packed_place
from data.stored_images import BadSampleError, StoredImage, StoredImages
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

# From this size on, numpy asks for huge pages: without, TLB misses cost a tenth of decoding.
_HUGE = 1 << 22
# Concurrent reads of a process, if each one waits for a network.
_REQUESTS = 16


class BatchRequest(NamedTuple):
    """Images to load: those of the endless training order, or of one pass in packing order."""

    indices: range
    once: bool


class Loaded(NamedTuple):
    """What was loaded besides pixels: labels int64 (n,), and a line for each bad sample."""

    labels: Ints
    bad: tuple[str, ...]


class _Draw(NamedTuple):
    """How one image index is transformed: drawn at random for training."""

    image_index: int
    flip: bool
    crop: Literal["center", "random"]


class Samples:
    """Random access to the images of a run by their indices.

    Raises:
        ValueError: too few images, or shards packed for another size than `config.image_size`.
    """

    def __init__(self, shards: Dataset, *, config: DataConfig, seed: int) -> None:
        parts, size = shards.parts, config.image_size
        for part in parts:
            fixed = part.image_size
            if config.crop == "center" and fixed not in (None, size):
                raise ValueError(
                    f"model.image_size = {size}, but {part.where} was packed at {fixed}: "
                    f"set it to {fixed}, or pack again with --size {size}"
                )
        self.shards, self.config, self.seed = shards, config, seed
        self.order = order_of(shards, seed=seed, streams=config.streams, block=config.block)
        self._ends = np.cumsum(shards.sizes)
        self._stored = [StoredImages(p, config=config, sharers=len(parts)) for p in parts]
        # The dataset of each shard, and the shard's number there.
        self._at = [
            (stored, number)
            for part, stored in zip(parts, self._stored, strict=True)
            for number in range(len(part.shards))
        ]
        waits = config.cache is not None or not all(is_local(part.root) for part in parts)
        self._threads = ThreadPoolExecutor(_REQUESTS) if waits else None
        self._scratch = np.empty(max(3 * size**2, _HUGE), dtype=np.uint8)
        all_cropped = all(part.image_size == size for part in parts)
        self._is_final = config.crop == "center" and all_cropped

    def load(self, request: BatchRequest, *, out: Pixels) -> Loaded:
        """Fill `out`, uint8 (n, H, W, 3), with the requested images.

        Raises:
            ValueError: a shard is not what its index says, or a whole block is damaged.
            OSError: a shard cannot be read.
        """
        indices = np.asarray(request.indices, dtype=np.int64)
        if request.once:
            place = packed_place(self._ends, indices)
        else:
            place = self.order.locate(indices)[1:]
        rows = zip(*(column.tolist() for column in place), strict=True)
        begun = [self._begin(shard, row) for shard, row in rows]
        draws = self._draws(request, indices)
        labels = np.empty(len(indices), dtype=np.int64)
        bad = []
        for i, (stored, draw) in enumerate(zip(begun, draws, strict=True)):
            try:
                labels[i] = self._put(stored(), draw, out[i])
            except BadSampleError as error:
                if request.once:
                    raise ValueError(f"{error}; all of these images must be intact") from None
                bad.append(str(error))
                labels[i] = self._stand_in(draw, out[i], str(error))
        return Loaded(labels, tuple(bad))

    def key(self, index: int) -> str:
        """The shard and the key of an image of the training order."""
        _, shard, row = self.order.locate([index])
        stored, number = self._at[int(shard[0])]
        return stored.key(number, int(row[0]))

    def close(self) -> None:
        """Close the shards' files."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for stored in self._stored:
            stored.close()

    def _draws(self, request: BatchRequest, indices: Ints) -> list[_Draw]:
        if request.once:
            return [_Draw(index, flip=False, crop="center") for index in indices.tolist()]
        flip = flips(seed=self.seed, indices=indices) & self.config.flip
        return [
            _Draw(index, flip=mirrored, crop=self.config.crop)
            for index, mirrored in zip(indices.tolist(), flip.tolist(), strict=True)
        ]

    def _begin(self, shard: int, row: int) -> Callable[[], StoredImage]:
        """Start reading a stored image; what is returned waits for it."""
        stored, number = self._at[shard]
        read = partial(stored.read, number, row)
        return self._threads.submit(read).result if self._threads else read

    def _stand_in(self, draw: _Draw, out: Pixels, why: str) -> int:
        """Replace a bad image by the next good one of its block; return that one's label."""
        for other in self.order.alternatives(draw.image_index):
            _, shard, row = self.order.locate([other])
            try:
                return self._put(self._begin(int(shard[0]), int(row[0]))(), draw, out)
            except BadSampleError:
                continue  # it is counted in its own place
        raise ValueError(f"{why}; and no image of its block is intact")

    def _put(self, stored: StoredImage, draw: _Draw, out: Pixels) -> int:
        """Decode an image into `out`, uint8 (H, W, 3); return its label."""
        try:
            if self._is_final:  # cropped when it was packed
                decode_into(stored.content, mirrored=draw.flip, out=out, scratch=self._scratch)
            else:
                pixels = self._crop(Image.fromarray(decode(stored.content)), draw)
                write(pixels[:, ::-1] if draw.flip else pixels, out=out)
        except UNDECODABLE as error:
            raise BadSampleError(f"{stored.where} cannot be decoded: {error}") from None
        return stored.label

    def _crop(self, image: Image.Image, draw: _Draw) -> Pixels:
        size = self.config.image_size
        if draw.crop == "random":
            return random_crop(image, size=size, seed=self.seed, index=draw.image_index)
        return center_crop(image, size=size)


def crop_remark(shards: Dataset, *, config: DataConfig) -> str:
    """A warning of crops of a dataset that are probably not intended, or ""."""
    return "; ".join(filter(None, (_crop_remark(part, config) for part in shards.parts)))


def _crop_remark(shards: Shards, config: DataConfig) -> str:
    size, fixed, kept = config.image_size, shards.image_size, shards.kept_side
    if fixed is not None and config.crop == "random":
        return (
            f'data.crop = "random", but {shards.where} was cropped to {fixed} pixels when it was '
            "packed: for ADM's random crops, pack with --keep-original"
        )
    if kept is not None and kept < size:
        return (
            f"{shards.where} was packed with --keep-original --size {kept}: its images are "
            f"enlarged to {size} pixels; pack again with --size {size} or more"
        )
    return ""
