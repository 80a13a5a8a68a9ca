"""How a rank's process ends: with a status, and with one report of what went wrong."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable

from data.exits import FAILED, REFUSED, is_ours
from trainer.ranks import terminal
from trainer.ranks.faults import Broken, Refused
from trainer.ranks.world import is_main_process, leave_mpi, process_name


def run_as_rank(main: Callable[[], int]) -> None:
    """End this process with the status of `main`; at an error report it and exit at once.

    What every rank raises alike is one line from rank 0; any other error names its rank and host, a
    ValueError of ours in one line, all else with the traceback. After it the process leaves
    without the shutdown of MPI and torch, which would wait for peers that are stuck in a
    collective it will never join.
    """
    terminal.tolerate_loss()
    try:
        _leave(main())
    except (Refused, Broken) as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        status = REFUSED if isinstance(error, Refused) else FAILED
        if not is_held_up():
            _leave(status)
    except Exception as error:
        if isinstance(error, ValueError) and is_ours(error):
            print(f"{process_name()}: error: {error}", file=sys.stderr)
            status = REFUSED
        else:
            print(f"{process_name()} failed:", file=sys.stderr)
            traceback.print_exc()
            status = FAILED
    _exit(status)


def _leave(status: int) -> None:
    """End this process as Python does, but without taking its interpreter down.

    Threads of torch free the tensors of the last collectives, for which they need the interpreter's
    lock. Python ends a thread that asks for it meanwhile, in a way that aborts the process: a job
    that has done its work would have failed.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    leave_mpi()
    _exit(status)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_held_up() -> bool:
    """Whether a thread still waits for the network, as for a peer that is gone: leaving may too."""
    return any(thread.daemon for thread in threading.enumerate())
