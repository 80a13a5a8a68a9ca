"""Several datasets in one stream, each with its share of the images.

Which dataset image g of a run is from is a pure function of (seed, g), as all of the order is. The
images are counted in periods of P, and of each period n_j are from dataset j, at places that are
permuted by perm(seed, _MIX, period): the shares are exact in every period. Image g is then the
m-th image from its dataset, m = period n_j + (those of dataset j before g in the period), and that
is image m of the dataset's own order, in which each of its images comes once in each epoch.
"""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from data.config import FetchConfig, naming
from data.dataset import Shards, open_shards
from data.manifest import NO_CLASS, Shard
from data.order import Ints, Order, Place, permutation

# The key of the permutations of periods, besides the seed.
_MIX = 0x4D4958
# The least length of a period, so that its permutation mixes the datasets well.
_SHORTEST = 1024
# The period of shares of 4 decimals.
_LONGEST = 10_000


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several datasets; of sum(counts) successive images, counts[j] are from parts[j].

    Shards are numbered through all datasets, in the order of `parts`.
    """

    parts: tuple[Shards, ...]
    counts: tuple[int, ...]

    @property
    def where(self) -> str:
        """The roots as messages show them."""
        return " + ".join(part.where for part in self.parts)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of all datasets."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(part.count for part in self.parts)

    @property
    def shares(self) -> tuple[tuple[Shards, float], ...]:
        """Each dataset, and its share of the images."""
        period = sum(self.counts)
        return tuple((p, n / period) for p, n in zip(self.parts, self.counts, strict=True))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that all datasets have; if theirs differ, that of images without labels."""
        first, *others = {part.classes for part in self.parts}
        return (NO_CLASS,) if others else first

    @property
    def labelled(self) -> bool:
        """Whether each image has a label, with the same meaning in all datasets."""
        return NO_CLASS not in self.classes

    @property
    def fingerprint(self) -> str:
        """Identifies the datasets and their shares."""
        body = [[p.fingerprint, n] for p, n in zip(self.parts, self.counts, strict=True)]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


Dataset = Shards | Mixture


def open_dataset(
    root: str,
    *,
    mix: tuple[str, ...],
    shares: tuple[float, ...],
    fetch: FetchConfig | None = None,
    check_files: bool = True,
) -> Dataset:
    """Open a dataset, or a mixture: `shares` of the images from `mix`, the rest from `root`.

    Raises:
        ValueError: as `open_shards`; or a dataset is there twice, or a share is too finely divided.
    """
    parts = tuple(open_shards(r, fetch=fetch, check_files=check_files) for r in (root, *mix))
    if not mix:
        return parts[0]
    if len({part.fingerprint for part in parts}) < len(parts):
        raise ValueError(f"data.mix = {list(mix)}: the same dataset is there twice")
    return Mixture(parts=parts, counts=_counts(shares))


def order_of(shards: Dataset, *, seed: int, streams: int, block: int) -> "Order | MixedOrder":
    """The order in which a run sees a dataset; ValueError as `Order`."""
    if isinstance(shards, Shards):
        with naming(shards.where):
            return Order(shards.sizes, seed=seed, streams=streams, block=block)
    orders = []
    for part in shards.parts:
        few = min(streams, part.count)  # a small dataset may have fewer images than streams
        with naming(part.where):
            orders.append(Order(part.sizes, seed=seed, streams=few, block=block))
    return MixedOrder(orders, counts=shards.counts, seed=seed)


class _Period(NamedTuple):
    """A period: each place's dataset, and how often it comes before in it; both int64 (P,)."""

    part: Ints
    before: Ints


class MixedOrder:
    """The order of a mixture, with the interface of `Order` and the shards of `Mixture`."""

    def __init__(self, orders: list[Order], *, counts: tuple[int, ...], seed: int) -> None:
        self._orders, self._counts, self._seed = orders, np.array(counts), seed
        self._period = int(self._counts.sum())
        self._first = np.cumsum([0, *(len(order.sizes) for order in orders)])
        self._at = lru_cache(maxsize=8)(self._draw)

    def locate(self, indices: ArrayLike) -> Place:
        """As `Order.locate`; the epoch is that of the image's dataset."""
        part, turn = self._turns(np.asarray(indices, dtype=np.int64))
        place = Place(*(np.empty_like(part) for _ in Place._fields))
        for j in np.unique(part):
            here = part == j
            epoch, shard, row = self._orders[j].locate(turn[here])
            place.epoch[here], place.row[here] = epoch, row
            place.shard[here] = shard + self._first[j]
        return place

    def alternatives(self, index: int) -> Ints:
        """As `Order.alternatives`: of the image's own dataset."""
        part, turn = self._turns(np.array([index]))
        j = int(part[0])
        period, nth = np.divmod(self._orders[j].alternatives(int(turn[0])), self._counts[j])
        places = [
            np.flatnonzero(self._at(int(p)).part == j)[n] for p, n in zip(period, nth, strict=True)
        ]
        return period * self._period + np.array(places, dtype=np.int64)

    def _turns(self, indices: Ints) -> tuple[Ints, Ints]:
        """The dataset of each image, and how many of it come before."""
        period, place = np.divmod(indices, self._period)
        part, turn = np.empty_like(indices), np.empty_like(indices)
        for p in np.unique(period):
            here, at = period == p, self._at(int(p))
            part[here] = at.part[place[here]]
            turn[here] = p * self._counts[part[here]] + at.before[place[here]]
        return part, turn

    def _draw(self, period: int) -> _Period:
        drawn = permutation(self._period, self._seed, _MIX, period)
        part = np.searchsorted(np.cumsum(self._counts), drawn, side="right")
        before = np.empty_like(part)
        for j in range(len(self._counts)):
            before[part == j] = np.arange(self._counts[j])
        return _Period(part, before)


def _counts(shares: tuple[float, ...]) -> tuple[int, ...]:
    """How many images of a period are from each dataset; the first has what the shares leave."""
    exact = [Fraction(repr(share)) for share in shares]
    period = lcm(*(share.denominator for share in exact))
    if period > _LONGEST:
        raise ValueError(
            f"data.mix_shares = {list(shares)}: must be decimals of at most 4 digits, such as 0.25"
        )
    period *= -(-_SHORTEST // period)
    counts = [int(share * period) for share in exact]
    return (period - sum(counts), *counts)
