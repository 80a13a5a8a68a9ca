"""Where the time of a run went: shares of productive training and of all that is not.

The main rank appends a line to `RUN/launch/timeline.jsonl` when a start claims the run, when it
begins to train, at every report and at its end. Unlike `metrics.jsonl` it only grows, so that it
shows what a resumed start did again.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from data.progress import duration
from trainer.ranks.process import began_at, boot_time
from trainer.watch import history
from trainer.watch.history import Row

# What a report says the interval spent beside training, in seconds: entry -> kind.
SPENT = {
    "suspended": "suspended",
    "compiling": "compiling",
    "waiting": "waiting for data",
    "saving": "saving",
    "averaging": "storing averages",
    "drawing": "drawing",
    "validating": "validating",
    "evaluating": "evaluating",
    "auditing": "auditing",
}
# All kinds of time.
KINDS = ("productive", "queued", "starting", "lost", *SPENT.values())


@dataclass(frozen=True)
class Goodput:
    """The time of a run by kind, and what the failures that it had advise."""

    #: Seconds by kind.
    seconds: Mapping[str, float]
    #: Starts that ended without saving: killed, or failed.
    failures: int
    #: How often it saved, and for how many seconds in all, lost or not.
    saves: int
    save_seconds: float
    images_per_second: float | None

    @property
    def shares(self) -> dict[str, float]:
        """The share of each kind."""
        total = sum(self.seconds.values())
        return {kind: s / total if total else 0.0 for kind, s in self.seconds.items()}

    @property
    def between_failures(self) -> float:
        """The mean time between failures, in seconds; without any, the time that the run ran."""
        ran = sum(self.seconds.values()) - self.seconds["queued"]
        return ran / max(self.failures, 1)

    @property
    def save_cost(self) -> float | None:
        """Seconds that training stood still for a checkpoint, on average."""
        return self.save_seconds / self.saves if self.saves else None

    @property
    def advised_interval(self) -> float | None:
        """Seconds between checkpoints that lose least: sqrt(2 x save cost x time to failure)."""
        if not self.save_cost:
            return None
        return math.sqrt(2 * self.save_cost * self.between_failures)

    def __str__(self) -> str:
        shares = sorted(self.shares.items(), key=lambda item: (item[0] != "productive", -item[1]))
        return ", ".join(f"{kind} {100 * s:.0f} %" for kind, s in shares if round(100 * s))

    def advice(self) -> str:
        """How often to save, in words; empty where nothing was saved."""
        if self.advised_interval is None:
            return ""
        often = duration(self.advised_interval)
        if self.images_per_second:
            often += f" ({self.advised_interval * self.images_per_second:,.0f} images)"
        ran = duration(sum(self.seconds.values()) - self.seconds["queued"])
        if not self.failures:
            return (
                f"a save costs {self.save_cost:.1f} s, no failure in {ran}: a checkpoint interval "
                f"below {often} would cost more than it protects"
            )
        return (
            f"advised checkpoint interval {often}: a save costs {self.save_cost:.1f} s, "
            f"{self.failures} failure{'s' * (self.failures > 1)} in {ran}"
        )


def account(rows: Sequence[Row], *, now: float | None = None) -> Goodput | None:
    """The time of a run from its timeline; None where that has no start.

    `now` is the present if the last start still runs. What lies behind the checkpoint that a later
    start resumed is lost, whatever it was. Between two starts only the time in a queue counts.
    """
    starts = _starts(rows)
    if not starts:
        return None
    is_live = now is not None and not starts[-1].state
    if is_live and now is not None:
        starts[-1].end = max(starts[-1].end, now - starts[-1].set_by)
    for before, start in pairwise(starts):
        before.end = max(before.end, min(start.last_sign, start.began) - before.set_by)
    resumed = math.inf
    for start in reversed(starts):
        start.resumed_later = resumed
        resumed = min(resumed, start.images)
    total = dict.fromkeys(KINDS, 0.0)
    ended = 0.0
    for start in starts:
        if start.submitted is not None:
            total["queued"] += max(start.began - max(ended, start.submitted), 0.0)
        for kind, seconds in start.account().items():
            total[kind] += seconds
        ended = start.end + start.set_by
    return Goodput(
        seconds=total,
        failures=sum(start.state in ("", "failed") for start in starts[: -1 if is_live else None]),
        saves=sum(start.saves for start in starts),
        save_seconds=sum(row.get("saving", 0.0) for start in starts for _, row in start.reports),
        images_per_second=_rate(rows),
    )


@dataclass
class _Start:
    """One start of a run. Its times are by the clock as it was at the first row."""

    began: float
    #: When the lease of the start before this one was last touched.
    last_sign: float
    #: When its job was submitted; None without a scheduler.
    submitted: float | None
    #: How it ended, as in state.json; empty where it did not say.
    state: str = ""
    #: When it began to train, and from which clock.
    trained: float | None = None
    images: float = math.inf
    end: float = 0.0
    #: Its reports, each after its time.
    reports: list[tuple[float, Row]] = field(default_factory=list)
    #: The smallest clock that a later start resumed.
    resumed_later: float = math.inf
    #: When the machine was booted, by the clock of the first row.
    booted: float | None = None
    #: The seconds by which the clock was set since.
    set_by: float = 0.0

    @property
    def saves(self) -> int:
        return sum(int(row.get("saves", 0)) for _, row in self.reports)

    def time_of(self, row: Row) -> float:
        """When a row was written; rows of earlier releases do not show that the clock was set."""
        if "uptime" in row:
            booted = row["time"] - row["uptime"]
            self.booted = booted if self.booted is None else self.booted
            self.set_by = booted - self.booted
        return float(row["time"] - self.set_by)

    def account(self) -> dict[str, float]:
        """Its seconds by kind."""
        total = dict.fromkeys(KINDS, 0.0)
        if self.trained is None:
            total["starting"] = max(self.end - self.began, 0.0)
            return total
        total["starting"] = max(self.trained - self.began, 0.0)
        at, images = self.trained, self.images
        for written, row in self.reports:
            span, clock = max(written - at, 0.0), row["images"]
            lost = min(max((clock - self.resumed_later) / max(clock - images, 1), 0.0), 1.0)
            spent = {kind: max(row.get(name, 0.0), 0.0) for name, kind in SPENT.items()}
            # Rounding, and clocks that were set, must not make more of it than there was.
            scale = min(span / sum(spent.values()), 1.0) if any(spent.values()) else 1.0
            kept = {kind: seconds * scale * (1 - lost) for kind, seconds in spent.items()}
            for kind, seconds in kept.items():
                total[kind] += seconds
            total["lost"] += span * lost
            total["productive"] += span * (1 - lost) - sum(kept.values())
            at, images = written, clock
        total[self._last()] += max(self.end - at, 0.0)
        return total

    def _last(self) -> str:
        """What the time after the last report was."""
        if self.state in ("finished", "stopped"):
            return "saving"
        return "lost" if self.resumed_later < math.inf or self.state else "productive"


def _starts(rows: Sequence[Row]) -> list[_Start]:
    starts: list[_Start] = []
    for row in rows:
        if row["event"] == "start":
            starts.append(
                _Start(row["began"], row.get("last_sign", 0.0), submitted=row.get("submitted"))
            )
        if not starts:
            continue
        start = starts[-1]
        at = start.time_of(row)
        start.end = max(start.end, at)
        if row["event"] == "training":
            start.trained, start.images = at, row["images"]
        elif row["event"] == "report":
            start.reports.append((at, row))
        elif row["event"] == "end":
            start.state = row["state"]
    return starts


def _rate(rows: Sequence[Row]) -> float | None:
    """The images per second of the last reports."""
    rates = [row["images_per_second"] for row in rows[-20:] if row.get("images_per_second")]
    return statistics.median_high(rates) if rates else None


def file(run: Path) -> Path:
    """The timeline of a run."""
    return run / "launch" / "timeline.jsonl"


def row(event: str, **facts: float | str | None) -> Row:
    """A row of the timeline, as of now."""
    return {"event": event, "time": time.time(), "uptime": boot_time(), **facts}


def append(run: Path, row: Row) -> None:
    """Append to the timeline. A disk that is full must not end the run for it."""
    with suppress(OSError), file(run).open("ab+") as stream:
        # A start that was killed may have torn its last line.
        torn = stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n"
        stream.write(("\n" * bool(torn) + json.dumps(row) + "\n").encode())


def note_start(run: Path, *, last_sign: float, job_id: str | None) -> None:
    """Append that a start has claimed the run. The start before it was alive at `last_sign`."""
    submitted = None
    if job_id is not None:
        with suppress(OSError):
            submitted = (run / "launch" / "job.json").stat().st_mtime
    began = began_at()
    append(run, row("start", began=began, last_sign=last_sign, submitted=submitted))


def read(run: Path) -> list[Row]:
    """The timeline; lines that are torn or damaged are left out, and a missing file is empty."""
    with suppress(OSError):
        return history.rows(file(run), known=_is_known)
    return []


def _is_known(row: Row) -> bool:
    event = row.get("event")
    if not isinstance(event, str) or event not in _NEEDED:
        return False
    numbers = row.get("uptime", 0.0), *(row.get(name) for name in ("time", *_NEEDED[event]))
    return all(type(number) in (int, float) for number in numbers)


# The numbers that a line of each event must have beside its time.
_NEEDED = {"start": ("began",), "training": ("images",), "report": ("images",), "end": ()}
