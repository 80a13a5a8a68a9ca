"""Metrics: added on the device, reduced over the ranks once an interval; the door to TensorBoard.

A step adds tensors to sums that stay on the device; nothing waits for the GPU until `write`, which
reduces all sums in one collective. What is written is the mean over all images of all ranks.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from launch.world import World

#: Losses are also shown for each quarter of the timesteps: the mean hides where a change happens.
QUARTERS = 4


class Metrics:
    """Sums since the last `write`, and the files of a run that they go to."""

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
        """Add one value of a quantity that is averaged over the steps of an interval."""
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


class Board:
    """`metrics.jsonl` and `tensorboard/` of a run. Only the main rank has one."""

    def __init__(self, run: Path, *, images: int, config: str) -> None:
        self._jsonl = (run / "metrics.jsonl").open("a")
        # What an earlier start wrote beyond the checkpoint that is resumed will be written again.
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)
        self._writer.add_text("config", f"```toml\n{config}\n```", global_step=images)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jsonl.close()
        self._writer.close()

    def scalars(self, values: Mapping[str, float], *, images: int) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._jsonl.write(json.dumps({"images": images, "time": time.time(), **finite}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, images)
        self._writer.flush()

    def grid(self, name: str, picture: Tensor, *, images: int) -> None:
        """Show uint8 (3, H, W)."""
        self._writer.add_image(name, picture, images)
        self._writer.flush()


class Progress:
    """One line that is drawn again at every step on a terminal; nothing elsewhere."""

    def __init__(self, *, total: int, done: int, unit: str = "images", shown: bool = True) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._start = done
        self._began = time.monotonic()
        self._shown = shown and sys.stdout.isatty()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._shown:
            text = f"{self._done:,} of {self._total:,} {self._unit}  {self.left()} left"
            print(f"\r{text.ljust(79)}", end="\r", flush=True)

    def left(self) -> str:
        """Time left at the mean rate since the start of this process."""
        if self._done == self._start:
            return "?"
        seconds = (time.monotonic() - self._began) / (self._done - self._start)
        return duration(seconds * (self._total - self._done))


def duration(seconds: float) -> str:
    """Such as "3 d 4 h", "2 h 12 min", "41 s": the two largest units."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
