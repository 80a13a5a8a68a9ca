"""Randomness without state: every draw is a pure function of (seed, image index, stream).

A batch may be split over any ranks and micro-batches, on any device, and each image still gets
the same bits. Only exactly rounded operations are used (integers, a table, one sum, one
product), because logarithms and cosines differ in the last bit between devices and versions.
"""

from functools import lru_cache
from math import prod, sqrt
from statistics import NormalDist

import torch
from torch import Tensor

TIMESTEP, NOISE, SAMPLE_START, SAMPLE_STEP = 0, 1, 2, 3
SAMPLE_LABEL, LABEL_DROPOUT = -1, -2
"""Streams, one per use. Step n of a sampler draws from stream SAMPLE_STEP + n."""

# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def uniform(indices: Tensor, *, seed: int, stream: int) -> Tensor:
    """One float32 in [0, 1) per image; `indices` is int64 (B,), the result (B,)."""
    bits = hash64(indices, seed=seed, stream=stream, count=1)[:, 0]
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def normal(indices: Tensor, *, seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise of `shape` per image: `indices` (B,) -> (B, *shape).

    Each value is the scaled sum of two quantiles, picked by 16 random bits each: 2**32 distinct
    values up to 6 sigma, and normal to within what 10^9 draws could tell.
    """
    size = prod(shape)
    bits = hash64(indices, seed=seed, stream=stream, count=(size + 1) // 2)
    table = _quantiles(indices.device)
    first = table[bits & 0xFFFF] + table[_shift(bits, 16) & 0xFFFF]
    second = table[_shift(bits, 32) & 0xFFFF] + table[_shift(bits, 48)]
    values = torch.stack((first, second), dim=-1).flatten(1)[:, :size]
    return values.mul(sqrt(0.5)).view(len(indices), *shape)


def hash64(indices: Tensor, *, seed: int, stream: int, count: int) -> Tensor:
    """`count` hashed 64-bit words per image, int64: `indices` (B,) -> (B, count)."""
    keys = _mix(indices + _start(seed, stream))
    counters = torch.arange(1, count + 1, device=indices.device) * _GAMMA
    return _mix(keys[:, None] + counters)


@lru_cache
def _start(seed: int, stream: int) -> int:
    """The key of a stream, which the images' indices are added to."""
    return int(_mix(_mix(torch.tensor(seed, dtype=torch.int64)) + stream))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own copies the sign bit."""
    return (x >> places) & ((1 << (64 - places)) - 1)


@lru_cache(maxsize=16)
def _quantiles(device: torch.device) -> Tensor:
    """The 65536 mid-quantiles of the standard normal, scaled to variance 1, float32."""
    inverse = NormalDist().inv_cdf
    upper = torch.tensor([inverse(0.5 + (i + 0.5) / 65536) for i in range(32768)]).double()
    table = torch.cat((-upper.flip(0), upper))
    return (table / table.square().mean().sqrt()).float().to(device)
