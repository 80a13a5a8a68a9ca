"""A process, as others on its machine see it: whether it still runs, is stopped, or has ended.

And its own clock, which does not go on while it is stopped.
"""

import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.ranks.world import host_name

# Seconds between two readings of a clock after which its process was stopped meanwhile.
STOPPED_FOR = 15.0
# Programs that a process starts to compile an operator.
_COMPILERS = {"ninja", "nvcc", "cicc", "ptxas", "c++", "g++", "cc1plus", "hipcc"}
# A random name of this start of the machine.
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# The state of a process of which /proc does not tell this user.
_HIDDEN = "?"


class RunningClock:
    """Seconds in which this process ran, without those in which it was stopped, as with its job.

    A thread must read it each second: that is how a stop shows.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = boot_time()
        #: For how many seconds the process was stopped so far.
        self.stopped = 0.0

    def __call__(self) -> float:
        """The time now."""
        with self._lock:
            now = boot_time()
            if now - self._read > STOPPED_FOR:
                self.stopped += now - self._read
            self._read = now
            return now - self.stopped


def boot_time() -> float:
    """Seconds since the machine was booted, those too in which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Process:
    """One process. Its number alone may come to mean another."""

    host: str
    #: Tells a machine and its process numbers from another of the same name.
    machine: str
    pid: int
    #: When it began, in clock ticks since the machine did.
    began: str

    @classmethod
    def here(cls) -> "Process":
        """This process."""
        return cls(host_name(), machine(), os.getpid(), _facts(os.getpid())[1])

    def has_ended(self) -> bool:
        """Whether it is known to have ended: what is on another machine is not known."""
        return has_ended(self.pid, on=self.machine, began=self.began)

    def is_stopped(self) -> bool:
        """Whether it is known to be stopped by a signal or a debugger."""
        return self.machine == machine() and _facts(self.pid)[0] in ("T", "t")


def has_ended(pid: int, *, on: str, began: str | None = None) -> bool:
    """As `Process.has_ended`; without `began`, another process may have the number by now."""
    if on != machine():
        return False
    state, found = _facts(pid)
    return state in "ZX" or (state != _HIDDEN and began is not None and found != began)


def began_at() -> float:
    """When this process was started, in seconds since 1970."""
    ticks = int(_facts(os.getpid())[1])
    age = boot_time() - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def machine() -> str:
    """Names this machine since it was started, and its process numbers."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:  # sandboxes, such as gVisor of 2022, may have none
        began = re.search(r"btime \d+", Path("/proc/stat").read_text())
        boot = f"{socket.gethostname()} {began and began[0]}"
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _facts(pid: int) -> tuple[str, str]:
    """The state of a process, one letter, and when it began; X where there is none."""
    after_name = proc(pid, "stat").rpartition(")")[2].split()
    if after_name:
        return after_name[0], after_name[19]
    return ("X" if _is_free(pid) else _HIDDEN), ""


def _is_free(pid: int) -> bool:
    """Whether no process has this number: /proc mounted with hidepid has one's own alone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def proc(pid: int, file: str) -> str:
    """A file of /proc about a process; empty where that has ended, or is hidden."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(n) for thread in threads for n in proc(pid, f"task/{thread}/children").split()]


def compiles(pid: int | None = None) -> bool:
    """Whether this process, or that one, has a compiler at work below it."""
    below = children(pid or os.getpid())
    return any(proc(n, "comm").strip() in _COMPILERS or compiles(n) for n in below)
