"""Metrics: added on the device, reduced over the ranks once an interval.

A step adds tensors to sums that stay on the device; nothing waits for the GPU until `reduce`, which
reduces all sums in one collective, to the means over all images of all ranks.
"""

import resource
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.ranks.world import World

# Losses are also shown for each quarter of the timesteps: the mean hides where a change happens.
QUARTERS = 4


class Metrics:
    """Sums since the last `reduce`."""

    def __init__(self, *, world: World, device: torch.device, timesteps: int) -> None:
        self._world = world
        self._device = device
        self._timesteps = timesteps
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._since = time.monotonic()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add one micro-batch: per-image terms (B,), among them `loss` and the timesteps `t`."""
        quarter = terms["t"] * QUARTERS // self._timesteps
        for name, values in terms.items():
            if name == "t":
                continue
            values = values.detach().double()
            self.put(name, values.sum(), values.numel())
            if name in ("loss", "mse", "vb"):
                zeros = torch.zeros(QUARTERS, dtype=torch.float64, device=values.device)
                sums = zeros.index_add(0, quarter, values)
                counts = zeros.index_add(0, quarter, torch.ones_like(values))
                for q in range(QUARTERS):
                    self.put(f"{name}/q{q}", sums[q], counts[q])

    def note(self, name: str, value: Tensor | float) -> None:
        """Add one value (a scalar) of a quantity that is averaged over the steps of an interval."""
        self.put(name, value, 1)

    def put(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a quantity whose mean is the sum of its totals over that of its counts."""
        if name not in self._sums:
            self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self._counts[name] = torch.zeros((), dtype=torch.float64, device=self._device)
        self._sums[name] += total
        self._counts[name] += count

    def reduce(self, *, images: int) -> dict[str, float]:
        """Means over all ranks since the last call, and the rate. All ranks must call it.

        `images` is how many images all ranks together took since then.
        """
        names = list(self._sums)
        flat = torch.stack([*self._sums.values(), *self._counts.values()])
        dist.all_reduce(flat)
        sums, counts = flat.cpu().view(2, -1).tolist()
        means = {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        peak = torch.tensor(_peak_memory(self._device), dtype=torch.float64, device=self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        now = time.monotonic()
        rate = images / (now - self._since)
        self._sums, self._counts, self._since = {}, {}, now
        return {**means, "images_per_second": rate, "memory_gib": float(peak)}

    def pause(self, seconds: float) -> None:
        """Leave `seconds` spent on something else (sample grids) out of the rate."""
        self._since += seconds


def _peak_memory(device: torch.device) -> float:
    """GiB: the most that was allocated on the GPU, or on the CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
