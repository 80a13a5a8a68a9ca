"""Metrics: kept on the device, and reduced over the ranks once an interval.

A step only keeps its tensors; those of many steps are added up by a few operations. Nothing waits
for the GPU until `reduce`, which reduces all sums in one collective, to the means over all images
of all ranks.
"""

import os
import re
import resource
import statistics
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.ranks.group import gather
from trainer.ranks.process import RunningClock, children, proc
from trainer.ranks.world import World, host_name
from trainer.watch.pace import SlowRanks, Stopwatch

#: Losses are also shown for each quarter of the timesteps: the mean hides where a change happens.
QUARTERS = 4
BY_QUARTER = ("loss", "mse", "vb")
# Micro-batches that are kept before they are added up.
_KEPT = 256


class Metrics:
    """Sums since the last `reduce`."""

    def __init__(
        self,
        *,
        world: World,
        device: torch.device,
        timesteps: int,
        clock: RunningClock,
        is_own_time: bool = True,
    ) -> None:
        self._world = world
        self._device = device
        self._timesteps = timesteps
        # Sums and counts by name.
        self._sums: dict[str, tuple[float, float]] = {}
        # Terms per image (B,), by name, and their sums by quarter: fp64 (terms, QUARTERS), of which
        # the first row counts the images.
        self._kept: list[Mapping[str, Tensor]] = []
        self._terms: dict[str, Tensor] = {}
        #: By this all times are measured: it stands still while the job is suspended.
        self.clock = clock
        self._since, self._stopped = clock(), clock.stopped
        self._spent: dict[str, float] = {}
        self._reports = 0
        self._host_at_start = torch.zeros(world.size, dtype=torch.float64)
        # Whether the forward pass waits for no other rank.
        self._is_own_time = is_own_time
        #: Runs during each forward pass.
        self.forward = Stopwatch(device)
        #: Which ranks are slow, as far as that can be known.
        self.slow = SlowRanks(gather(host_name()))

    def add(self, micro_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Add a step that counts: per-image terms (B,), among them `loss` and the timesteps `t`."""
        for terms in micro_batches:
            self._kept.append({name: values.detach() for name, values in terms.items()})
        if len(self._kept) >= _KEPT:
            self._add_up()

    def note(self, name: str, value: float, *, count: float = 1) -> None:
        """Add one value of a quantity that is averaged over the steps of an interval.

        With `count` it is the total of so many values.
        """
        total, number = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value, number + count)

    def reduce(self, *, images: int) -> dict[str, float]:
        """Means over all ranks since the last call, rates and memory. All ranks must call it.

        `images` is how many images all ranks together took since then.
        """
        self._add_up()
        sums, terms = self._reduced()
        means = {name: total / count for name, (total, count) in sums.items() if count}
        means |= _means(terms)
        now = self.clock()
        seconds = now - self._since
        mine = (_peak_memory(self._device), _host_memory(), self.forward.read())
        ranks = torch.tensor(gather(mine), dtype=torch.float64)
        if "data_wait_seconds" in sums:
            waited, _ = sums["data_wait_seconds"]
            means["data_wait_share"] = waited / (self._world.size * seconds)
        means |= {f"{what}_seconds": spent for what, spent in self._spent.items()}
        if stopped := self.clock.stopped - self._stopped:
            means["suspended_seconds"] = stopped
            self._stopped += stopped
        self._sums, self._terms, self._since, self._spent = {}, {}, now, {}
        rates = {"images_per_second": images / seconds, "interval_seconds": seconds}
        return {**means, **rates, **self._memory(ranks), **self._pace(ranks, now=now)}

    def _add_up(self) -> None:
        """Add what is kept to the sums by quarter."""
        if not self._kept:
            return
        columns = {name: torch.cat([terms[name] for terms in self._kept]) for name in self._kept[0]}
        self._kept = []
        quarter = columns.pop("t") * QUARTERS // self._timesteps
        columns = {"images": torch.ones_like(columns["loss"]), **columns}
        table = torch.stack([values.double() for values in columns.values()])
        sums = table.new_zeros(len(columns), QUARTERS).index_add(1, quarter, table)
        for name, row in zip(columns, sums, strict=True):
            self._terms[name] = self._terms[name] + row if name in self._terms else row

    def _reduced(self) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
        """The sums and counts of all ranks, and those of the terms by quarter on the host."""
        own = torch.tensor(list(self._sums.values()), dtype=torch.float64).view(-1)
        flat = torch.cat([own.to(self._device), *self._terms.values()])
        dist.all_reduce(flat)
        whole = flat.cpu()
        pairs = whole[: len(own)].view(-1, 2).tolist()
        rows = whole[len(own) :].view(-1, QUARTERS)
        sums = dict(zip(self._sums, pairs, strict=True))
        return sums, dict(zip(self._terms, rows, strict=True))

    def pause(self, since: float, *, on: str) -> None:
        """Leave the time since a reading of `clock`, `on` something else, out of the rate."""
        seconds = self.clock() - since
        self._since += seconds
        self._spent[on] = self._spent.get(on, 0.0) + seconds

    @property
    def spent(self) -> Mapping[str, float]:
        """Seconds that were left out since the last `reduce`, by what they were spent on."""
        return dict(self._spent)

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


def _means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each term, and of losses by quarter of t, from sums (QUARTERS,) on the host."""
    found = {}
    rows = dict(sums)
    images = rows.pop("images", torch.zeros(QUARTERS))
    for name, row in rows.items():
        found[name] = float(row.sum() / images.sum())
        for q in range(QUARTERS) if name in BY_QUARTER else ():
            if images[q]:
                found[f"{name}/q{q}"] = float(row[q] / images[q])
    return found


def _peak_memory(device: torch.device) -> float:
    """GiB: the most that was allocated on the GPU, or on the CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _host_memory() -> float:
    """GiB: what this process and its workers have for themselves on the host."""
    own = (os.getpid(), *children(os.getpid()))
    kib = [re.search(r"RssAnon:\s+(\d+) kB", proc(pid, "status")) for pid in own]
    return sum(int(found[1]) for found in kib if found) / 2**20
