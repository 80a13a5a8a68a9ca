"""A signal becomes a flag, as does the end of torchrun; the ranks agree on it and leave together.

No rank acts on a signal alone: one that left at its own step would leave the others waiting in
a collective. The training loop folds `stop_requested` into what all ranks agree on at every step.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from trainer.ranks.world import is_main_process

# HUP comes when the terminal is closed or its ssh connection drops.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds after which another Ctrl-C means it. torchrun passes on the one that its terminal also
# gave to the ranks.
PATIENCE = 3.0
# What a stop signal does, in training and in drawing.
TRAINING = "the run saves and stops after this step"
DRAWING = "the drawing stops after this step; finished batches are kept"


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Within, Ctrl-C ends the process: no handler of Python's runs while torch waits for a peer."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Preemption:
    """While entered, a stop signal only sets `stop_requested`; a later Ctrl-C interrupts.

    `effect` is what the process does then, in words that rank 0 prints at the signal.
    """

    def __init__(self, effect: str = TRAINING) -> None:
        self._stop_requested, self._effect = False, effect
        # torchrun starts the ranks itself; those of one that was killed would train on unseen.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # nohup has HUP ignored, and that is what its user wants.
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._signals = tuple(n for n in STOP_SIGNALS if not (is_nohup and n == signal.SIGHUP))
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was told to stop, or its torchrun has ended."""
        if self._parent not in (None, os.getppid()) and not self._stop_requested:
            self._stop_requested = True
            self._say("torchrun has ended")
        return self._stop_requested

    @stop_requested.setter
    def stop_requested(self, requested: bool) -> None:
        self._stop_requested = requested

    def record_early(self) -> None:
        """Set `stop_requested` before this is entered too, but by Ctrl-C.

        For a process that has long imports ahead of it, in which a signal would kill it.
        """
        for number in (n for n in self._signals if n != signal.SIGINT):
            signal.signal(number, self._on_signal)
            # A signal that is repeated must not kill Python while it ends.
            self._before[number] = signal.SIG_IGN

    def __enter__(self) -> Self:
        for number in self._signals:
            self._before.setdefault(number, signal.signal(number, self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._stop_requested:
            # Both ahead of the line: as it is written, the next signal may come.
            self._stop_requested, self._since = True, time.monotonic()
            if is_main_process():
                self._say("stop requested")
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt

    def _say(self, what: str) -> None:
        """Not by print, which a signal may have interrupted."""
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{what}: {self._effect}\n".encode())
