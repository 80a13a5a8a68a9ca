"""Worker processes of a command, which end with it; and signals that ask it to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from types import FrameType
from typing import TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

# The signals that ask a command to stop.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def cpus() -> int:
    """How many CPUs this process may use: within a job, only those that it was given."""
    return len(os.sched_getaffinity(0))


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
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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
