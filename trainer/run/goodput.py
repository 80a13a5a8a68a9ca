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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data import files
from data.progress import duration
from trainer.ranks.process import began_at, boot_time
from trainer.run import history
from trainer.run.history import Row
from trainer.run.lease import beat
from trainer.run.starts import KINDS, RECURRING, starts_of


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
    def training_share(self) -> float:
        """The share of training in the time that it and what recurs beside it take, as saves."""
        training = self.seconds["productive"] + self.seconds["waiting for data"]
        beside = sum(self.seconds[kind] for kind in RECURRING)
        return training / (training + beside) if training else 1.0

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

    `now` is the present by the last start's clock, if that still runs. What lies behind the
    checkpoint that a later start resumed is lost, whatever it was. Between two starts only the time
    in a queue counts.
    """
    starts = starts_of(rows)
    if not starts:
        return None
    is_live = now is not None and not starts[-1].state
    if is_live and now is not None:
        starts[-1].end = max(starts[-1].end, now - starts[-1].set_by)
    for before, start in pairwise(starts):
        start.follow(before)
    resumed = math.inf
    for start in reversed(starts):
        start.resumed_later = resumed
        resumed = min(resumed, start.images)
    total = dict.fromkeys(KINDS, 0.0)
    for start in starts:
        total["queued"] += start.queued()
        for kind, seconds in start.account().items():
            total[kind] += seconds
    return Goodput(
        seconds=total,
        failures=sum(start.state in ("", "failed") for start in starts[: -1 if is_live else None]),
        saves=sum(start.saves for start in starts),
        save_seconds=sum(row.get("saving", 0.0) for start in starts for _, row in start.reports),
        images_per_second=_rate(rows),
    )


def ahead(run: Path, rows: Sequence[Row], *, is_live: bool) -> float:
    """The seconds by which the clock of who wrote the last row was ahead of that of the files.

    If nothing writes the run now, that is as of its last start: it may have been copied since.
    """
    if rows and is_live:
        return float(rows[-1]["time"] - files.touched(file(run)) / 1e9)
    starts = starts_of(rows)
    return starts[-1].ahead if starts else 0.0


def starting(rows: Sequence[Row], *, now: float) -> float | None:
    """For how many seconds the last start has run without a report; None where it has reported.

    `now` as for `account`.
    """
    starts = starts_of(rows)
    if not starts or starts[-1].reports:
        return None
    return now - starts[-1].set_by - starts[-1].began


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


def note_start(run: Path, *, last_sign: float, job_id: str | None) -> float:
    """Append that a start has claimed the run. The start before it was alive at `last_sign`.

    What compares this start with others is by the clock of the files, not by this machine's.
    Returns the seconds by which this one is ahead.
    """
    submitted = written = claimed = None
    if job_id is not None:
        with suppress(OSError):
            submitted = (run / "launch" / "job.json").stat().st_mtime
    with suppress(OSError):
        written = files.touched(file(run)) / 1e9 or None
        claimed = beat(run) / 1e9 or None
    found = row(
        "start",
        began=began_at(),
        last_sign=last_sign,
        submitted=submitted,
        written=written,
        claimed=claimed,
    )
    append(run, found)
    return starts_of([found])[0].ahead


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
