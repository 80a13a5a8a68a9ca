"""The output directory: locked while a process packs, and removed if the packing is refused."""

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data import files
from data.manifest import MANIFEST

# The directory in OUT for what is needed only while packing; it is removed in the end.
WORK = ".packing"
# The file in it with the digest of the plan that an unfinished packing follows.
PLAN = "plan"
# The file in OUT that lists the images that are not in the dataset.
LEFT_OUT = "left-out.txt"
# In the suffix of a file that is being written, before host and process.
PARTIAL = "partial"
_LOCK = "lock"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold `out` alone, with `WORK` in it.

    Directories made here are removed again if the packing is refused.

    Raises:
        ValueError: `out` holds something else than a packing, or another process packs there.
        OSError: `out` cannot be made.
    """
    files.check_link(out)
    if out.exists() and not {WORK, MANIFEST} & set(os.listdir(out)) and any(out.iterdir()):
        raise ValueError(f"OUT = {out} is not empty and no packed dataset; choose another OUT")
    work = out / WORK
    is_new = not work.exists()
    is_held = is_refused = False
    with _directory(work):
        try:
            with (work / _LOCK).open("w") as lock:
                _lock(lock.fileno(), out)
                is_held = True
                _remove_partials(out)
                yield
        except ValueError:
            # Without a plan, another attempt cannot use what was unpacked there.
            is_refused = is_new and not (work / PLAN).exists()
            raise
        finally:  # after closing the lock: network file systems keep files that are open
            if is_held:
                _clean_up(out, is_refused=is_refused)


def writer() -> str:
    """The suffix of files that this process is writing, which no other process uses."""
    return f"{PARTIAL}-{socket.gethostname()}-{os.getpid()}"


def _remove_partials(out: Path) -> None:
    """Delete what killed processes left half written."""
    for directory in (out, out / WORK):
        for path in directory.glob(f"*.{PARTIAL}*"):
            path.unlink(missing_ok=True)


def _clean_up(out: Path, *, is_refused: bool) -> None:
    """Remove from `WORK` what is not needed later; `--again` needs the plan and the records."""
    work = out / WORK
    is_done = (out / MANIFEST).exists()
    if is_refused or os.listdir(work) == [_LOCK] or (is_done and not (out / LEFT_OUT).exists()):
        shutil.rmtree(work, ignore_errors=True)
    elif is_done:
        for path in (*work.glob("*.blob"), *work.glob("*.ends.npy")):
            path.unlink(missing_ok=True)


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Make a directory and its parents; in the end, remove those of them that are empty."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # it is not empty, or is gone already
                each.rmdir()


def _lock(descriptor: int, out: Path) -> None:
    """Take the lock until the file is closed; ValueError where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"OUT = {out}: another process is packing there") from None
    except OSError as error:  # some parallel file systems have no locks
        print(f"{out} cannot be locked ({error}): run no second packing there", file=sys.stderr)
