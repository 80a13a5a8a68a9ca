"""First step of the data's way: which sample is image g of a run?

A pure function of (seed, g). Nothing here touches a file, so the position of a run in its data is
one integer, `images_seen`, and every rank, worker and restart computes the same answer.

S logical streams share each epoch. Image g belongs to stream s = g mod S, as its m-th image,
m = g div S. With N images and L = N div S, that is position p = m mod L of epoch e = m div L. An
epoch lays the shards end to end in the order perm(seed, e); stream s owns L consecutive positions
of that tape and reads them block by block, each block of k positions permuted by
perm(seed, e, s, block). Block borders are staggered by s k / S, so that the streams do not all
open a new block in the same step. The N mod S images that do not fit are a window that moves on
by its own length every epoch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(words: ArrayLike) -> Words:
    """One step of the splitmix64 generator from each 64-bit state: uint64, of the same shape."""
    z = np.asarray(words, dtype=np.uint64) + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keyed(*words: ArrayLike) -> Words:
    """Hash a key of integers, e.g. (seed, image index), to uniform 64-bit words.

    Arrays in the key broadcast; the result is uint64, of their shape, at least (1,).
    """
    # numpy warns of overflow for scalars but not for arrays; the wrap-around is the point.
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = splitmix64(state ^ np.atleast_1d(np.asarray(word)).astype(np.uint64))
    return state


def uniform(*words: ArrayLike) -> NDArray[np.float64]:
    """Like `keyed`, as float64 in [0, 1)."""
    return (keyed(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *key: int) -> Ints:
    """The permutation named by `key`: int64 (size,). Pinned by a golden test."""
    return np.argsort(keyed(*key, np.arange(size)), kind="stable")


class Place(NamedTuple):
    """Where images are: int64 arrays of equal shape."""

    epoch: Ints
    shard: Ints
    row: Ints


class _Tape(NamedTuple):
    """The shards of one epoch end to end, less the images that it leaves out."""

    shards: Ints  # in the order of the epoch
    ends: Ints  # tape position after each of them
    starts: Ints  # first kept image of each, counted in packing order
    window: int  # first image left out, in packing order


class Order:
    """The order in which a run sees its dataset.

    Args:
        sizes: samples per shard; empty shards are fine.
        seed: of the run.
        streams: S, logical streams; more of them mix better and leave up to S - 1 images out.
        block: k, images within which a stream is shuffled.

    Raises:
        ValueError: a setting below 1, or fewer images than streams.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, streams: int, block: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.images = int(self.sizes.sum())
        self.seed, self.streams, self.block = seed, streams, block
        if not self.images:
            raise ValueError("too few images: the shards hold none")
        if streams < 1 or block < 1:
            raise ValueError(
                f"data.streams = {streams} and data.block = {block} must be at least 1"
            )
        if self.images < streams:
            raise ValueError(
                f"too few images: the shards hold {self.images}, data.streams = {streams} needs "
                f"at least one each; set data.streams to {max(self.images, 1)} or less"
            )
        self.length = self.images // streams
        self._borders = np.concatenate([[0], np.cumsum(self.sizes)])
        # Those of some epochs, and the current block of each stream and some around it: older ones
        # are not needed again.
        self._tape = lru_cache(maxsize=4)(self._lay)
        self._permutation = lru_cache(maxsize=4 * streams)(permutation)

    @property
    def left_out(self) -> int:
        """Images that an epoch does not serve: fewer than `streams`."""
        return self.images - self.streams * self.length

    def locate(self, indices: ArrayLike) -> Place:
        """Find the epoch, shard and row of each image index (n,): int64 (n,) each."""
        turn, stream = np.divmod(np.asarray(indices, dtype=np.int64), self.streams)
        epoch, position = np.divmod(turn, self.length)
        tape_at = stream * self.length + self._shuffled(epoch, stream, position)
        place = Place(epoch, np.empty_like(epoch), np.empty_like(epoch))
        for e in np.unique(epoch):
            here = epoch == e
            place.shard[here], place.row[here] = self._on_tape(int(e), tape_at[here])
        return place

    def alternatives(self, index: int) -> Ints:
        """The other image indices of this one's block, int64 (n,), in the order after it.

        The images there replace this one if it is damaged.
        """
        turn, stream = divmod(index, self.streams)
        position = turn % self.length
        _, first, size = self._block_of(np.array([stream]), np.array([position]))
        step = (position - int(first[0]) + np.arange(1, int(size[0]))) % int(size[0])
        return (turn - position + int(first[0]) + step) * self.streams + stream

    def _block_of(self, stream: Ints, position: Ints) -> tuple[Ints, Ints, Ints]:
        """Block number, first position and size of the block around each position."""
        stagger = stream * self.block // self.streams
        block = (position + stagger) // self.block
        first = np.maximum(block * self.block - stagger, 0)
        last = np.minimum((block + 1) * self.block - stagger, self.length)
        return block, first, last - first

    def _shuffled(self, epoch: Ints, stream: Ints, position: Ints) -> Ints:
        """Positions after the permutation of their blocks."""
        block, first, size = self._block_of(stream, position)
        per_stream = self.length // self.block + 2
        keys = (epoch * self.streams + stream) * per_stream + block
        unique, sample, which = np.unique(keys, return_index=True, return_inverse=True)
        if not len(unique):
            return first
        perms = [
            self._permutation(int(size[i]), self.seed, int(epoch[i]), int(stream[i]), int(block[i]))
            for i in sample
        ]
        starts = np.cumsum([0, *map(len, perms)])
        return first + np.concatenate(perms)[starts[which] + position - first]

    def _on_tape(self, epoch: int, position: Ints) -> tuple[Ints, Ints]:
        """Shard and row at each position of an epoch's tape."""
        tape = self._tape(epoch)
        at = np.searchsorted(tape.ends, position, side="right")
        shard = tape.shards[at]
        begin = np.where(at > 0, tape.ends[at - 1], 0)
        kept = tape.starts[at] + position - begin
        return shard, kept + self.left_out * (kept >= tape.window) - self._borders[shard]

    def _lay(self, epoch: int) -> _Tape:
        """Put the shards of an epoch end to end, without its window of left-out images."""
        shards = permutation(len(self.sizes), self.seed, epoch)
        # The window moves by its own length every epoch, and starts again when the next one would
        # reach beyond the last image.
        window = self.left_out * (epoch % (self.images // max(self.left_out, 1)))
        # Images before each border that stay, in packing order: all but those in the window.
        kept = self._borders - np.clip(self._borders - window, 0, self.left_out)
        return _Tape(shards, np.cumsum(np.diff(kept)[shards]), kept[:-1][shards], window)


def packed_place(ends: Ints, indices: ArrayLike) -> tuple[Ints, Ints]:
    """Shard and row of images that are counted in packing order, int64 of the shape of `indices`.

    `ends` are the running sums of the shards' samples.
    """
    shard = np.searchsorted(ends, indices, side="right")
    return shard, np.asarray(indices) - np.concatenate([[0], ends])[shard]


def share(images_seen: int, *, batch_size: int, rank: int, ranks: int) -> range:
    """The images of the step at `images_seen` that one of the ranks trains on."""
    return range(images_seen + (rank - images_seen) % ranks, images_seen + batch_size, ranks)
