"""Averages of the weights along a run, and averages of other widths made of them afterwards.

The exponential average is the paper's (section 2; decay 0.9999 per step). The power-function
average and its reconstruction from snapshots are those of Karras et al. 2023 (arXiv:2312.02696,
section 3 and appendix C). Time is counted in images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

#: A power-function average is narrower than the mean over the whole run.
WIDEST = 1 / math.sqrt(12)


class Average(Protocol):
    """After each update of the weights, average <- beta average + (1 - beta) weights."""

    def beta(self, *, since: int, now: int) -> float:
        """The factor of the update at the clock `now`, where the last one was at `since`.

        Both in images; `since` is 0 at the first update. Steps that were skipped, and batches of
        other sizes, change the span in between and so need nothing of their own.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Decays by `decay` every `images`, or at each update if that is None.

    With `warmup`, the half-life is at most that share of the images seen, so that the random
    start leaves at the first update; at that limit the average is a power function's.
    """

    decay: float
    images: int | None = None
    warmup: float | None = None

    def beta(self, *, since: int, now: int) -> float:
        """As `Average.beta`."""
        if self.images is None:
            return self.decay
        steady = self.decay ** ((now - since) / self.images)
        if self.warmup is None:
            return steady
        return min(steady, (since / now) ** (math.log(2) / self.warmup))


@dataclass(frozen=True, kw_only=True)
class PowerFunction:
    """Weighs the time t of a run in proportion to t^gamma; its relative width is `width`.

    The width is the standard deviation of that profile as a share of the images seen.
    """

    width: float

    def beta(self, *, since: int, now: int) -> float:
        """As `Average.beta`."""
        return float((since / now) ** (gamma(self.width) + 1))


def gamma(width: float) -> float:
    """The exponent of the profile of relative width `width`, which is below `WIDEST`.

    The largest root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), with s the width.
    """
    c = width**-2
    g, last = 1 / width, math.inf  # beyond the root, where the cubic is convex
    while g < last:
        last = g
        g -= (((g + 7) * g + 16 - c) * g + 12 - c) / ((3 * g + 14) * g + 16 - c)
    return g


@dataclass(frozen=True)
class Profile:
    """A power-function average at a time: after so many images, of so much relative width.

    In each of the `gaps` (c, n) the run went back from n to the weights of c: what was averaged up
    to c counts for all time up to n.
    """

    images: float
    width: float
    gaps: tuple[tuple[float, float], ...] = ()

    def in_units_of(self, time: float) -> "Profile":
        """The same with times as shares of `time`."""
        gaps = tuple((before / time, after / time) for before, after in self.gaps)
        return Profile(self.images / time, self.width, gaps)

    def log_factor(self, begin: float) -> float:
        """Its logarithm at t >= `begin`, up to the next end of a gap, less gamma log t."""
        exponent = gamma(self.width) + 1
        found = math.log(exponent) - exponent * math.log(self.images)
        for before, after in self.gaps:
            if before <= begin < after:
                return -math.inf
            if begin < before:
                found += exponent * math.log(after / before)
        return found


def products(some: Sequence[Profile], others: Sequence[Profile]) -> Tensor:
    """The integrals over time of the products of profiles, float64 (len(some), len(others))."""
    edges = sorted({edge for p in (*some, *others) for gap in p.gaps for edge in gap})
    if edges:
        return _products_between([0.0, *edges, math.inf], some, others)
    time, exponent = _columns(some)
    other_time, other_exponent = (column[None] for column in _columns(others))
    time, exponent = time[:, None], exponent[:, None]
    earlier, later = torch.minimum(time, other_time), torch.maximum(time, other_time)
    # Before the earlier one's end, the later profile has grown to this share of its last value.
    share = (earlier / later) ** torch.where(time > other_time, exponent, other_exponent)
    scale = (exponent + 1) * (other_exponent + 1) / (exponent + other_exponent + 1)
    return scale * share / later


def _products_between(
    edges: Sequence[float], some: Sequence[Profile], others: Sequence[Profile]
) -> Tensor:
    """As `products`, where no profile has a gap that begins or ends between two `edges`."""
    time, exponent = (column[:, None] for column in _columns(some))
    other_time, other_exponent = (column[None] for column in _columns(others))
    power = exponent + other_exponent + 1
    total = torch.zeros(len(some), len(others), dtype=torch.float64)
    for begin, end in pairwise(edges):
        until = torch.minimum(time, other_time).clamp(begin, end)
        mine = torch.tensor([[p.log_factor(begin)] for p in some], dtype=torch.float64)
        theirs = torch.tensor([[p.log_factor(begin) for p in others]], dtype=torch.float64)
        # In logarithms: the powers of short times are beyond float64.
        whole = (mine + theirs + power * until.clamp(min=1e-300).log()).exp()
        total += whole * (1 - (begin / until.clamp(min=1e-300)) ** power) / power
    return total


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    """The times and exponents of profiles, float64 (n,) each."""
    table = [(profile.images, gamma(profile.width)) for profile in profiles]
    time, exponent = torch.tensor(table, dtype=torch.float64).T
    return time, exponent


@dataclass(frozen=True)
class Combination:
    """How stored averages add up to another one."""

    #: One for each stored average; they add up to 1.
    coefficients: tuple[float, ...]
    #: The distance of the combined profile from the wanted one, relative to the wanted one (L2).
    error: float


def combine(stored: Sequence[Profile], *, wanted: Profile) -> Combination:
    """The combination of `stored` averages that is nearest to the `wanted` one (L2 of profiles).

    Those that are later than the wanted one get the coefficient 0.
    """
    used = [i for i, profile in enumerate(stored) if profile.images <= wanted.images]
    # In units of the wanted time, so that the numbers are of one size.
    unit = [stored[i].in_units_of(wanted.images) for i in used]
    target = [Profile(1.0, wanted.width)]
    among, towards = products(unit, unit), products(unit, target)[:, 0]
    x = torch.linalg.solve(among, towards)
    x = x / x.sum()
    own = float(products(target, target))
    square = float(x @ among @ x - 2 * x @ towards) / own + 1
    coefficients = [0.0] * len(stored)
    for i, value in zip(used, x.tolist(), strict=True):
        coefficients[i] = value
    return Combination(tuple(coefficients), math.sqrt(max(square, 0.0)))
