"""How far work has come: a line on a terminal, and the time left."""

import sys
import time

from data.progress import duration


class Progress:
    """One line that is drawn again at every step on a terminal; nothing elsewhere."""

    def __init__(self, *, total: int, done: int, unit: str = "images", shown: bool = True) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._start = done
        self._began = time.monotonic()
        self._shown = shown and sys.stdout.isatty()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._shown:
            text = f"{self._done:,} of {self._total:,} {self._unit}  {self.left()} left"
            print(f"\r{text.ljust(79)}", end="\r", flush=True)

    def left(self) -> str:
        """Time left at the mean rate since the start of this process."""
        if self._done == self._start:
            return "?"
        seconds = (time.monotonic() - self._began) / (self._done - self._start)
        return duration(seconds * (self._total - self._done))
