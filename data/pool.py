"""Processes that work for a command, end with it, and leave all signals to it."""

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

# Ask a command to stop.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def cpus() -> int:
    """The CPUs that this process may use: a job's share of its node, not all of them."""
    return len(os.sched_getaffinity(0))


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """New Python processes. An error kills them: what they were doing is of no use any more."""
    executor = ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent)
    try:
        yield executor
        executor.shutdown(cancel_futures=True)
    except BaseException:  # also one that comes while processes are still starting, and waited for
        for child in active_children():
            child.kill()
        executor.shutdown(cancel_futures=True)
        raise


def submit(
    executor: Executor, call: Callable[[_Given], _Made], given: Sequence[_Given]
) -> list[Future[_Made]]:
    """Submit calls. Processes that start with them get none of the signals that ask to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return [executor.submit(call, each) for each in given]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within, a signal that asks to stop raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays ignored, such as SIGHUP under nohup.
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
    """End this process as soon as the one that started it has ended, however that was."""
    parent = parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
