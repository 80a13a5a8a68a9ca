"""How a rank's process ends: with a status, and with one report of what went wrong.

Neither a terminal that was closed nor a full disk under its output ends it.
"""

import atexit
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data import files
from data.descriptors import without_threads
from data.exits import (
    FAILED,
    REFUSED,
    TO_BE_CONTINUED,
    errors_for,
    interruptible,
    is_ours,
    open_streams,
)
from trainer.ranks.faults import Broken, PeerLost, Refused, describe
from trainer.ranks.world import is_main_process, leave_mpi, process_name

# How the names of threads begin that may wait for the network.
NETWORK = "network: "


def run_as_rank(main: Callable[[], int]) -> None:
    """End this process with the status of `main`; at an error report it and exit at once.

    What every rank raises alike is one line from rank 0; any other error names its rank and host, a
    ValueError or OSError of ours and Ctrl-C in one line, all else with the traceback. After it the
    process leaves without the shutdown of MPI and torch, which would wait for peers that are stuck
    in a collective it will never join.
    """
    _tolerate_loss()
    try:
        with interruptible():
            status = main()
        if status == TO_BE_CONTINUED:
            _tell_torchrun("saved and stopped early; rerun the same command to resume")
        _leave(status)
    except (Refused, Broken) as error:
        _tell_torchrun(f"error: {error}")
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        status = REFUSED if isinstance(error, Refused) else FAILED
        if not is_held_up():
            _leave(status)
    except KeyboardInterrupt:
        _report("interrupted: what was not saved is lost; rerun the same command")
        status = 128 + signal.SIGINT
    except PeerLost as error:
        _report(f"error: {error}")
        status = FAILED
    except Exception as error:
        if isinstance(error, ValueError | OSError) and is_ours(error):
            _report(f"error: {describe(error)}")
            status = REFUSED if isinstance(error, ValueError) else FAILED
        elif said := without_threads(error):
            _report(f"error: {said}")
            status = FAILED
        else:
            _tell_torchrun(f"{type(error).__name__}: {error}")
            print(f"{process_name()} failed:", file=sys.stderr)
            traceback.print_exc()
            status = FAILED
    _exit(status)


def _report(text: str) -> None:
    """Say in one line why this rank ends."""
    _tell_torchrun(text)
    print(f"{process_name()}: {text}", file=sys.stderr)


def _tell_torchrun(text: str) -> None:
    """Let torchrun end its report with why this rank ended, not with a link to torch's manual."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # it is on the disk that is full
            files.write(Path(file), json.dumps({"message": text, "timestamp": int(time.time())}))


@contextmanager
def no_exit() -> Iterator[None]:
    """Within, a library that ends the process, as DeepSpeed's autotuning does, is an error.

    It could pass for work that is done: its status is 0.
    """
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(
            f"a library ended this process (status {error.code or 0}) before its work was done"
        ) from error


def _leave(status: int) -> None:
    """End this process as Python does, but without taking its interpreter down.

    Threads of torch free the tensors of the last collectives, for which they need the interpreter's
    lock. Python ends a thread that asks for it meanwhile, in a way that aborts the process: a job
    that has done its work would have failed.
    """
    # The threads of an executor that was left open wait for work until this wakes them.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    leave_mpi()
    _exit(status)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_held_up() -> bool:
    """Whether a thread still waits for the network, as for a peer that is gone: leaving may too."""
    return any(thread.name.startswith(NETWORK) for thread in threading.enumerate())


class _Lossy(io.FileIO):
    """A file descriptor that accepts everything; what cannot be written is dropped.

    The terminal of a run is closed, its ssh connection drops, the disk of its output is full: what
    a rank prints may get lost; it never ends training.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data))


def _tolerate_loss() -> None:
    """Let stdout and stderr of this process drop what they cannot write."""
    open_streams()
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        before.flush()
        raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
        # Nor a letter that the locale has no code for, such as one in the name of a directory.
        stream = io.TextIOWrapper(raw, encoding=before.encoding, errors=errors_for(before))
        stream.reconfigure(line_buffering=number == 2 or before.line_buffering)
        setattr(sys, name, stream)
