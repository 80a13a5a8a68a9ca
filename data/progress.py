"""How far work has come: the time left, durations in words, and lines on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """Such as "3 d 4 h", "2 h 12 min", "41 s": the two largest units; below 0 as 0."""
    days, rest = divmod(round(max(seconds, 0.0)), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def seconds_left(elapsed: float, *, done: int, rest: int) -> float:
    """At the mean rate, when `done` took `elapsed` seconds and so many more are to come."""
    return elapsed / max(done, 1) * rest


@dataclass(frozen=True)
class Step:
    """How far work has come: items, units of work such as images, units a second, the time left."""

    items: int
    done: int
    rate: float
    left: str


def with_progress(
    items: Iterable[T],
    *,
    total: int,
    said: Callable[[Step], str],
    units: Callable[[T], int] = lambda _: 1,
    closing: bool = False,
) -> Iterator[T]:
    """Pass items on, and print to stderr at most once a second what `said` makes of it.

    `total` counts units, of which each item is `units`. With `closing`, the end is printed too.
    """
    begin = shown = time.monotonic()
    done = 0
    for number, item in enumerate(items, start=1):
        done += units(item)
        if (now := time.monotonic()) - shown > 1 or (closing and done >= total):
            left = duration(seconds_left(now - begin, done=done, rest=total - done))
            print(said(Step(number, done, done / (now - begin), left)), file=sys.stderr)
            shown = now
        yield item
