"""How fast each rank computes: which ranks hold the others up.

In a synchronous run the steps of all ranks take the time of the slowest. The forward pass is each
rank's own: in ZeRO stages 1 and 2 no collective delays it.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A rank is slow at so many times the time of the median rank, or of its own best interval ...
SLOW = 1.25
# ... for so many reports, and so many seconds: shorter disturbances pass.
REPORTS, SECONDS = 3, 30.0
# Slow ranks that a line names.
_NAMED = 4


class Stopwatch:
    """Measures spans of the device's work without waiting for it: CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._spans = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is done meanwhile."""
        self._spans += 1
        if self._is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began

    def read(self) -> float:
        """Seconds of a span on average since the last call; 0.0 if there was none."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        mean = self._seconds / max(self._spans, 1)
        self._events, self._seconds, self._spans = [], 0.0, 0
        return mean


@dataclass
class _Pace:
    """What is known of one rank."""

    best: float = float("inf")
    #: Reports in a row that found it slow, and the time of the first of them.
    reports: int = 0
    since: float = 0.0


class SlowRanks:
    """Judges the ranks' forward times of each interval. The same on every rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._paces = [_Pace() for _ in hosts]
        #: Those that are slow, worst first; empty if none is.
        self.text = ""
        #: Whether the last `judge` found others than the one before.
        self.is_news = False
        self._slow: set[int] = set()

    def judge(self, seconds: Sequence[float], *, now: float) -> None:
        """Take in each rank's time, by rank."""
        median = statistics.median_low(seconds)
        factors: dict[int, tuple[float, float]] = {}
        for rank, (pace, taken) in enumerate(zip(self._paces, seconds, strict=True)):
            pace.best = min(pace.best, taken or pace.best)
            against = (taken / median if median else 1.0, taken / pace.best)
            if max(against) < SLOW:
                pace.reports = 0
                continue
            pace.reports += 1
            if pace.reports == 1:
                pace.since = now
            if pace.reports >= REPORTS and now - pace.since >= SECONDS:
                factors[rank] = against
        self.is_news = self._slow != factors.keys()
        self._slow = set(factors)
        self.text = self._named(factors)

    def _named(self, factors: dict[int, tuple[float, float]]) -> str:
        worst = sorted(factors, key=lambda rank: -max(factors[rank]))
        words = [
            f"rank {rank} on {self._hosts[rank]} ({factors[rank][0]:.2f} x the median rank, "
            f"{factors[rank][1]:.2f} x its own best)"
            for rank in worst[:_NAMED]
        ]
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        return ", ".join(words) + more
