"""Limits of the system: files that may be open, threads and processes that may be started."""

import errno
import os
import resource
from contextlib import suppress

# Enough for a shard and its index in each of 192 streams, some of which are in two shards.
_WANTED = 512
# Some containers allow 10^9, and programs that close every possible descriptor take minutes.
_ENOUGH = 1 << 16


def raise_limit() -> None:
    """Raise this process's soft limit of open files to its hard limit, where that is allowed.

    Processes started after that inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require(count: int, *, why: str) -> None:
    """Raise ValueError unless this process may hold so many files open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        raise ValueError(
            f"at most {soft} files may be open in this process (ulimit -n), "
            f"and {why} need {count}: raise the hard limit (LimitNOFILE of slurmd, or limits.conf)"
        )


def share() -> int:
    """How many files a reader keeps open: half of what is allowed at most, and at least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _WANTED
    return max(min(_WANTED, soft // 2), 1)


def without_threads(error: BaseException) -> str:
    """The message for an error that no thread or process can be started; "" for other errors."""
    raised = isinstance(error, RuntimeError | BlockingIOError)
    known = ("can't start new thread", os.strerror(errno.EAGAIN))  # of Python and of C++
    if not (raised and str(error).endswith(known)):
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = "no limit" if soft == resource.RLIM_INFINITY else soft
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)  # in which each thread's stack lies
    memory = "" if soft == resource.RLIM_INFINITY else f"memory (ulimit -v: {soft >> 10}), that of "
    return (
        f"{error}: raise the limit of {memory}threads and processes (ulimit -u: {limit}), or that "
        "of the container (docker run --pids-limit, podPidsLimit of Kubernetes)"
    )
