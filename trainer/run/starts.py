"""The starts of a run, from the rows of its timeline: how long each lasted, and what it did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.run.history import Row

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
# What a run does again and again beside training.
RECURRING = set(SPENT.values()) - {"suspended", "compiling", "waiting for data"}
# All kinds of time.
KINDS = ("productive", "queued", "starting", "lost", *SPENT.values())


@dataclass
class Start:
    """One start of a run. Its times are by its machine's clock as it was at the first row.

    What it has of other starts and of its job is by the clock of the files: machines' may differ.
    """

    began: float
    #: When the lease of the start before this one was last touched.
    last_sign: float
    #: When its job was submitted; None without a scheduler.
    submitted: float | None
    #: When the last row before this start was written; None in rows of earlier releases.
    written: float | None = None
    #: The seconds by which its machine's clock was ahead of that of the files.
    ahead: float = 0.0
    #: When the start before this one ended.
    ended: float = 0.0
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
        """How often it saved."""
        return sum(int(row.get("saves", 0)) for _, row in self.reports)

    def follow(self, before: "Start") -> None:
        """Note when the start before this one ended, which may have said nothing of it."""
        written = before.end + before.set_by if self.written is None else self.written
        last_sign = min(self.last_sign, self.began - self.ahead)
        before.end += max(last_sign - written, 0.0)
        self.ended = max(written, last_sign)

    def queued(self) -> float:
        """The seconds for which its job waited and no other start ran."""
        if self.submitted is None:
            return 0.0
        return max(self.began - self.ahead - max(self.ended, self.submitted), 0.0)

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


def starts_of(rows: Sequence[Row]) -> list[Start]:
    """The starts of a run, in their order."""
    starts: list[Start] = []
    for row in rows:
        if row["event"] == "start":
            starts.append(
                Start(
                    row["began"],
                    row.get("last_sign", 0.0),
                    submitted=row.get("submitted"),
                    written=row.get("written"),
                    ahead=row["time"] - (row.get("claimed") or row["time"]),
                )
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
