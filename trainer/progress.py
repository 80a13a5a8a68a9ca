"""How far work has come: a line on a terminal, and the time left."""

import sys
import time
from collections.abc import Callable

from data.progress import duration, seconds_left

# Seconds between two lines elsewhere than on a terminal.
_EVERY = 60.0


class Progress:
    """One line that is drawn again at every step on a terminal.

    Elsewhere `say`, if it is given, hears of it once a minute.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int,
        unit: str = "images",
        shown: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._start = done
        self._began = self._said = time.monotonic()
        self._shown = shown and sys.stdout.isatty()
        self._say = say if shown and not self._shown else None

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._shown:
            text = f"{self._done:,} of {self._total:,} {self._unit}  {self.left()} left"
            print(f"\r{text.ljust(79)}", end="\r", flush=True)
        if self._say is not None and time.monotonic() > self._said + _EVERY:
            self._said = time.monotonic()
            rate = (self._done - self._start) / (self._said - self._began)
            done = f"{self._done:,} of {self._total:,} {self._unit}"
            self._say(f"{done}, {rate:,.1f} a second, {self.left()} left")

    def left(self) -> str:
        """Time left at the mean rate since the start of this process."""
        if self._done == self._start:
            return "?"
        done, rest = self._done - self._start, self._total - self._done
        return duration(seconds_left(time.monotonic() - self._began, done=done, rest=rest))
