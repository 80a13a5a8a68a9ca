"""A signal becomes a flag; the ranks agree on it and leave together.

No rank acts on a signal alone: one that left at its own step would leave the others waiting in
a collective. The training loop folds `requested` into what all ranks agree on at every step.
"""

import signal
from collections.abc import Iterable
from types import FrameType

#: Exit status of a run that saved, left early, and wants to be started again (EX_TEMPFAIL).
TO_BE_CONTINUED = 75

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """While entered, the first stop signal sets `requested`; a second one acts as it always did."""

    def __init__(self, signals: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
        self.requested: str | None = None
        self._signals = tuple(signals)
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        # Only Ctrl-C is impatient: schedulers repeat their signals while the ranks save.
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
