"""What a job of `python -m launch sample` leaves for programs, and how it is told to stop.

The job has a directory as a run has one: a lease shows that it lives, `launch/state.json` says how
it stands, and it stops while there is a file `launch/stop`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.ranks.faults import failed_hosts, named_hosts
from trainer.ranks.signals import Preemption
from trainer.ranks.world import scheduler_job
from trainer.run.lease import Lease, claim, way_to_resume
from trainer.run.runstate import RunState, State

# Seconds between two looks for the file `stop`.
_EVERY = 2.0


class JobState:
    """Writes how a job stands, for programs; without a job (None) it writes nothing."""

    def __init__(self, job: Path | None) -> None:
        before = RunState.read(job) if job is not None else None
        self._job = job
        self._drawn = int((before.checkpoint if before else None) or 0)
        self._has_failed, self._writing = False, threading.Lock()
        #: The right to write the job's directory; it knows of a request to stop.
        self.lease: Lease | None = None

    def fail(self, why: str) -> None:
        """Note that this start has failed, from the watchdog's thread; it has been printed."""
        with suppress(OSError):
            self.note("failed", why, lost=named_hosts(why))

    @property
    def why_stopped(self) -> str:
        """Who stopped it, where it was stopped."""
        requested = self.lease is not None and self.lease.stop_requested
        return "by `python -m launch stop`" if requested else "by a signal"

    @property
    def way_to_resume(self) -> str:
        """As `trainer.run.lease.way_to_resume`."""
        return "rerun the same command to resume" if self._job is None else way_to_resume(self._job)

    def note(self, state: State, why: str | None = None, *, lost: str | None = None) -> None:
        """Write the state, with the number of batches that all starts have drawn.

        `lost` has the hosts whose ranks were lost. What is noted after a failure is ignored.
        """
        with self._writing:
            if self._job is None or self._has_failed:
                return
            self._has_failed = state == "failed"
            RunState(
                state=state,
                why=why,
                lost=lost,
                job_id=scheduler_job()[0],
                checkpoint=f"{self._drawn:012d}" if self._drawn else None,
            ).write(self._job)

    def advance(self, batches: int = 1) -> None:
        """Note that more batches are drawn; a start that draws none has made no progress."""
        self._drawn += batches
        with suppress(OSError):  # the batches are on disk
            self.note("running")


@contextmanager
def noted(job: Path | None, *, preemption: Preemption) -> Iterator[JobState]:
    """Claim the job, note that it is running, and watch for a request to stop it.

    On leaving, an error is noted; otherwise the state is what the caller noted last.

    Raises:
        ValueError: another process draws for this job.
    """
    state = JobState(job)
    if job is None:
        yield state
        return
    done, lease = threading.Event(), claim(job)
    state.lease = lease

    def watch() -> None:
        while not done.wait(_EVERY):
            if lease.stop_requested:
                preemption.stop_requested = True

    state.note("running")
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield state
    except KeyboardInterrupt:
        with suppress(OSError):
            state.note("stopped", "by Ctrl-C")
        raise
    except Exception as error:
        with suppress(OSError):
            how: State = "refused" if isinstance(error, ValueError) else "failed"
            state.note(how, f"{error}", lost=failed_hosts(error))
        raise
    finally:
        done.set()
        lease.release()
