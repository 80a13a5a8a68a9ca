"""Signs of life of runs: the scheduler is asked once for all of them, and their leases looked at.

A lease is touched every few seconds. Clocks of machines may differ by minutes, so that the time of
the last touch says little by itself: where it is not the present by this machine's clock, a change
of it is awaited.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch import queue, records
from trainer.run import lease

# Seconds in which the holder of a lease touches it several times.
_WAIT = 5 * lease.BEAT


@dataclass
class _Beat:
    """The last touch of a lease by the file's clock (ns), and when this process saw it change."""

    time: int
    #: In seconds of this process's monotonic clock; None while no change was seen.
    changed: float | None


class Signs:
    """Remembers what it saw: looking again is quick."""

    def __init__(self) -> None:
        self._jobs = queue.Jobs()
        self._job_ids: dict[Path, str] = {}
        self._beats: dict[Path, _Beat] = {}

    def look(self, runs: Iterable[Path]) -> None:
        """Look at these runs. Takes some seconds where a lease is not seen to be touched."""
        runs = list(runs)
        self._job_ids = {run: found for run in runs if (found := records.job_id(run))}
        self._jobs.look(self._job_ids.values())
        self._look_at_beats(runs)

    def job_id(self, run: Path) -> str | None:
        """Slurm's id of the run's last job; None for a run without one."""
        return self._job_ids.get(run)

    def job(self, run: Path) -> queue.Entry | None:
        """That job, or None where Slurm has no record; ValueError where Slurm did not respond."""
        return self._jobs.find(self._job_ids[run])

    def is_alive(self, run: Path) -> bool:
        """Whether a process holds the run's lease and was seen to touch it."""
        beat = self._beats.get(run)
        return (
            beat is not None
            and beat.changed is not None
            and time.monotonic() < beat.changed + _WAIT
        )

    def now(self, run: Path) -> float:
        """The present in seconds since 1970, by the clock of a live run's own files."""
        return self._beats[run].time / 1e9 if self.is_alive(run) else time.time()

    def _look_at_beats(self, runs: Iterable[Path]) -> None:
        held = [run for run in runs if _is_held(run)]
        self._beats = {run: self._beats.get(run, _Beat(0, None)) for run in held}
        doubtful = {run for run in held if self._is_doubtful(run)}
        end = time.monotonic() + _WAIT
        while doubtful and time.monotonic() < end:
            time.sleep(0.1)
            doubtful -= {run for run in doubtful if self._is_touched(run)}

    def _is_doubtful(self, run: Path) -> bool:
        """Whether a lease that is seen for the first time was touched at another time than now."""
        beat = self._beats[run]
        if beat.time:
            self._is_touched(run)
            return False
        beat.time = lease.beat(run)
        if abs(time.time() - beat.time / 1e9) < _WAIT:
            beat.changed = time.monotonic()
        return beat.changed is None

    def _is_touched(self, run: Path) -> bool:
        """Whether the lease was touched since the last look."""
        beat, now = self._beats[run], lease.beat(run)
        if now == beat.time:
            return False
        beat.time, beat.changed = now, time.monotonic()
        return True


def _is_held(run: Path) -> bool:
    """Whether a process that may be alive holds the run; not so where that cannot be read."""
    try:
        holder = lease.holder(run)
    except OSError:
        return False
    return holder is not None and not holder.is_gone()
