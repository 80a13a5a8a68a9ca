"""What a job of `python -m launch sample` leaves for programs, and how it is told to stop.

The job has a directory as a run has one: a lease shows that it lives, `launch/state.json` says how
it stands, and it stops while there is a file `launch/stop`.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.ranks.lease import claim
from trainer.ranks.signals import Preemption
from trainer.ranks.world import scheduler_job
from trainer.runstate import RunState, State

# Seconds between two looks for the file `stop`.
_EVERY = 2.0


@contextmanager
def noted(job: Path | None, *, preemption: Preemption) -> Iterator[Callable[[State], None]]:
    """While entered, the job's state is "running"; then it is what the function was called with.

    A process without a job notes nothing.

    Raises:
        ValueError: another process draws for this job.
    """
    if job is None:
        yield lambda _: None
        return
    done, lease = threading.Event(), claim(job)

    def note(state: State, why: str | None = None) -> None:
        writer, job_id = f"{socket.gethostname()}.{os.getpid()}", scheduler_job()[0]
        RunState(state=state, why=why, job_id=job_id).write(job, writer=writer)

    def watch() -> None:
        while not done.wait(_EVERY):
            if lease.stop_requested:
                preemption.stop_requested = True

    note("running")
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield note
    except KeyboardInterrupt:
        with suppress(OSError):
            note("stopped", "by Ctrl-C")
        raise
    except Exception as error:
        with suppress(OSError):
            note("refused" if isinstance(error, ValueError) else "failed", f"{error}")
        raise
    finally:
        done.set()
        lease.release()
