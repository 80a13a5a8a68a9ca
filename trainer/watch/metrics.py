"""Metrics: added on the device, reduced over the ranks once an interval.

A step adds tensors to sums that stay on the device; nothing waits for the GPU until `reduce`, which
reduces all sums in one collective, to the means over all images of all ranks.
"""

import re
import resource
import socket
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.ranks.group import gather
from trainer.ranks.world import World
from trainer.watch.pace import SlowRanks, Stopwatch

# Losses are also shown for each quarter of the timesteps: the mean hides where a change happens.
QUARTERS = 4


class Metrics:
    """Sums since the last `reduce`."""

    def __init__(
        self, *, world: World, device: torch.device, timesteps: int, is_own_time: bool = True
    ) -> None:
        self._world = world
        self._device = device
        self._timesteps = timesteps
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._since = time.monotonic()
        self._spent: dict[str, float] = {}
        self._reports = 0
        self._host_at_start = torch.zeros(world.size, dtype=torch.float64)
        # Whether the forward pass waits for no other rank.
        self._is_own_time = is_own_time
        #: Runs during each forward pass.
        self.forward = Stopwatch(device)
        #: Which ranks are slow, as far as that can be known.
        self.slow = SlowRanks(gather(socket.gethostname()))

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

    def add_all(self, micro_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Add the micro-batches of a step that counts."""
        for terms in micro_batches:
            self.add(terms)

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
        """Means over all ranks since the last call, rates and memory. All ranks must call it.

        `images` is how many images all ranks together took since then.
        """
        names = list(self._sums)
        flat = torch.stack([*self._sums.values(), *self._counts.values()])
        dist.all_reduce(flat)
        sums, counts = flat.cpu().view(2, -1).tolist()
        means = {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        now = time.monotonic()
        seconds = now - self._since
        ranks = self._by_rank(_peak_memory(self._device), _host_memory(), self.forward.read())
        if "data_wait_seconds" in names:
            waited = sums[names.index("data_wait_seconds")]
            means["data_wait_share"] = waited / (self._world.size * seconds)
        means |= {f"{what}_seconds": spent for what, spent in self._spent.items()}
        self._sums, self._counts, self._since, self._spent = {}, {}, now, {}
        rates = {"images_per_second": images / seconds, "interval_seconds": seconds}
        return {**means, **rates, **self._memory(ranks), **self._pace(ranks, now=now)}

    def pause(self, seconds: float, *, on: str) -> None:
        """Leave `seconds` spent `on` something else (saving, drawing, ...) out of the rate."""
        self._since += seconds
        self._spent[on] = self._spent.get(on, 0.0) + seconds

    def _by_rank(self, *mine: float) -> Tensor:
        """What each rank gives, as a row (R, N) on the host."""
        row = torch.tensor(mine, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(row) for _ in range(self._world.size)]
        dist.all_gather(rows, row)
        return torch.stack(rows).cpu()

    def _memory(self, ranks: Tensor) -> dict[str, float]:
        """The most that any rank uses, in GiB, and how much its host's has grown."""
        device, host = ranks[:, 0].max(), ranks[:, 1]
        # The first report comes before all buffers are there.
        self._reports += 1
        if self._reports <= 2:
            self._host_at_start = host
        growth = (host - self._host_at_start).max()
        return {
            "memory_gib": float(device),
            "host_memory_gib": float(host.max()),
            "host_memory_growth_gib": float(growth),
        }

    def _pace(self, ranks: Tensor, *, now: float) -> dict[str, float]:
        """The forward time of the median rank, and of the slowest relative to it."""
        if not self._is_own_time:
            return {}
        seconds = ranks[:, 2].tolist()
        self.slow.judge(seconds, now=now)
        median = statistics.median_low(seconds)
        return {
            "forward_seconds": median,
            "slowest_rank": max(seconds) / median if median else 1.0,
        }


def _peak_memory(device: torch.device) -> float:
    """GiB: the most that was allocated on the GPU, or on the CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _host_memory() -> float:
    """GiB: what this process and its workers have for themselves on the host."""
    tasks = Path("/proc/self/task").glob("*/children")
    own = ["self", *(child for task in tasks for child in _read(task).split())]
    kib = [re.search(r"RssAnon:\s+(\d+) kB", _read(Path(f"/proc/{pid}/status"))) for pid in own]
    return sum(int(found[1]) for found in kib if found) / 2**20


def _read(file: Path) -> str:
    """A file of /proc; empty when its process has just ended."""
    try:
        return file.read_text()
    except OSError:
        return ""
