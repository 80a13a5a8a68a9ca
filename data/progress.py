"""Progress of work: the time left, durations in words, lines on a terminal or on stderr."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Seconds between two lines of `Progress` elsewhere than on a terminal.
_EVERY = 60.0


def on_terminal() -> bool:
    """Whether stdout is the user's terminal, where a line can be drawn again.

    Open MPI gives rank 0 a terminal even if mpirun writes to a file: that does not count.
    """
    return sys.stdout.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ


def duration(seconds: float) -> str:
    """Seconds in the two largest units, as "3 d 4 h", "2 h 12 min", "41 s"; negative as 0."""
    days, rest = divmod(round(max(seconds, 0.0)), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def seconds_left(elapsed: float, *, done: int, rest: int) -> float:
    """The time that `rest` items take at the mean rate so far: `done` in `elapsed` seconds."""
    return elapsed / max(done, 1) * rest


@dataclass(frozen=True)
class Step:
    """How far work has come."""

    items: int
    #: Units of work, such as images.
    done: int
    #: Units a second.
    rate: float
    #: The time left, in words; "?" where the total is not known.
    left: str


def with_progress(
    items: Iterable[T],
    *,
    said: Callable[[Step], str],
    total: int | None = None,
    units: Callable[[T], int] = lambda _: 1,
    closing: bool = False,
) -> Iterator[T]:
    """Pass items on; at most once a second, print to stderr the line that `said` makes of a step.

    An item is `units(item)` units of work, of which there are `total`, None if unknown. With
    `closing`, the last step is printed in any case.
    """
    begin = shown = time.monotonic()
    done = 0
    for number, item in enumerate(items, start=1):
        done += units(item)
        ends = closing and total is not None and done >= total
        if (now := time.monotonic()) - shown > 1 or ends:
            spent, left = now - begin, "?"
            if total is not None:
                left = duration(seconds_left(spent, done=done, rest=total - done))
            print(said(Step(number, done, done / spent, left)), file=sys.stderr)
            shown = now
        yield item


class Progress:
    """One line on a terminal, drawn again at every step.

    Elsewhere, `say` is called with a line once a minute. Rate and time left are by `clock`.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int = 0,
        unit: str = "images",
        shown: bool = True,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._start = done
        self._clock = clock
        self._began = self._said = clock()
        self._shown = shown and on_terminal()
        self._say = say if shown and not self._shown else None

    def advance(self, count: int = 1) -> None:
        """Count more units as done, and show it."""
        self._done += count
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        if self._shown:
            text = f"{done}  {self.left()} left"
            print(f"\r{text.ljust(79)}", end="\r", flush=True)
            if self._done >= self._total:  # a shorter line may follow
                print(" " * 79, end="\r", flush=True)
        if self._say is not None and self._clock() > self._said + _EVERY:
            self._said = self._clock()
            rate = (self._done - self._start) / (self._said - self._began)
            self._say(f"{done}, {rate:,.1f} a second, {self.left()} left")

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items on, each a unit, and count it as done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def left(self) -> str:
        """Time left at the mean rate since the start of this process."""
        if self._done == self._start:
            return "?"
        done, rest = self._done - self._start, self._total - self._done
        return duration(seconds_left(self._clock() - self._began, done=done, rest=rest))
