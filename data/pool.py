"""Worker processes of a command, which end with it; and signals that ask it to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

# The signals that ask a command to stop.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The control groups of this process, and where all are.
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpus() -> int:
    """How many CPUs this process may use: within a job or container, only those that it has."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas()])))


def _quotas() -> Iterator[float]:
    """The limits on CPU time of this process's control groups and of those above, in CPUs.

    Docker and Kubernetes limit CPUs so; the process still sees all CPUs of the node.
    """
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            place, names = _GROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            place, names = _GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        own = place / group.lstrip("/")
        for directory in (own, *own.parents):
            with suppress(OSError, ValueError):  # not there; "max" and -1 are no limit
                words = " ".join((directory / name).read_text() for name in names).split()
                quota, period = map(int, words)
                if quota > 0:
                    yield quota / period


def other_mpi(library: str) -> str:
    """What is wrong where MPI started several processes, and to mpi4py each one is alone.

    `library` is the MPI of mpi4py, by its own words.
    """
    own = library.partition(",")[0].strip()
    return (
        f"mpi4py uses {own}, and another MPI started them: use the mpirun of the former "
        "(under srun an --mpi that it knows, as `srun --mpi=list` has them), or build mpi4py for "
        "the latter: `MPICC=$(which mpicc) pip install --force-reinstall --no-cache-dir "
        "--no-binary mpi4py mpi4py`"
    )


def no_mpi(error: Exception) -> str:
    """What is wrong where mpi4py cannot be imported."""
    why = "; ".join(f"{error}".splitlines())
    return (
        f"mpi4py: {why}: load the site's MPI, as by `module load openmpi`, or name its library in "
        "MPI4PY_LIBMPI"
    )


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """New Python processes. An error kills them, since their work is of no use any more."""
    executor = ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent)
    try:
        yield executor
        executor.shutdown(cancel_futures=True)
    except BaseException:  # also one during the start or the wait for the end of processes
        for child in active_children():
            child.kill()
        executor.shutdown(cancel_futures=True)
        raise


@contextmanager
def cancelling(executor: Executor) -> Iterator[Executor]:
    """An executor whose calls that have not begun are cancelled by an error.

    `processes` does without: shut down a second time, an executor does not wait for its thread,
    which prints a traceback if Python ends before it.
    """
    with executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def submit(
    executor: Executor, call: Callable[[_Given], _Made], given: Sequence[_Given]
) -> list[Future[_Made]]:
    """Submit calls. Processes that this starts do not receive the signals that ask to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return [executor.submit(call, each) for each in given]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside, a signal that asks to stop raises KeyboardInterrupt, as Ctrl-C does."""
    # An ignored signal stays ignored, such as SIGHUP under nohup.
    heard = [number for number in _STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it ends, for whatever reason."""
    parent = parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
