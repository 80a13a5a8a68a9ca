"""Commands that one process starts, one after the other: a stop signal reaches the one that runs.

subprocess.run would kill it a quarter of a second after Ctrl-C, and leave it behind after TERM.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from data.exits import TO_BE_CONTINUED
from trainer.ranks import signals
from trainer.ranks.signals import Preemption

# torchrun kills ranks that have not saved so many seconds after a signal; its own default is 30.
_SECONDS_TO_SAVE = 600


# The C library, whose call the new process makes: looking for it there would take locks.
_LIBC = ctypes.CDLL(None)
# Linux' number of "send me a signal when my parent ends".
_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Let this process be told to save and leave when what started it is killed."""
    _LIBC.prctl(_PDEATHSIG, signal.SIGTERM)


def on_ranks(command: Sequence[str], *, ranks: int) -> list[str]:
    """The words that run a module of ours, and its own, in so many processes of this machine."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        # The machine's own name may have no address, for which torchrun would wait for minutes.
        start += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += ["--nproc-per-node", str(ranks), "-m", "--"]
    return [*start, *command]


class Commands(Preemption):
    """While entered, the first stop signal is passed on to the command that runs, and none begins.

    So is a Ctrl-C some seconds later. The others are not: a second signal ends torchrun before
    its ranks have saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._signals += (signal.SIGQUIT,)  # it would end this process alone
        self._running: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Wait for `command` to end; returns its exit status, below 0 where a signal killed it."""
        if self.stop_requested:
            return TO_BE_CONTINUED
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SECONDS_TO_SAVE), **os.environ}
        # A session of its own, which the terminal's Ctrl-C does not reach: it is passed on, once.
        self._running = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        if self.stop_requested:  # meanwhile
            self._running.send_signal(signal.SIGTERM)
        return self._running.wait()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        insists = number == signal.SIGINT and now - self._since > signals.PATIENCE
        if self._stop_requested and not insists:
            return
        self._stop_requested, self._since = True, now
        if self._running is not None:
            # torchrun knows no USR1.
            known = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            self._running.send_signal(known)
