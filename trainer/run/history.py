"""Rows of JSON in a run: `metrics.jsonl` has one for each report, validation and evaluation.

No torch here.
"""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Bytes read from the end of the metrics: thousands of rows.
_TAIL = 200_000
# Groups of metrics whose rows are not reports of training.
_MEASURED = ("validation/", "evaluation/")


def file(run: Path) -> Path:
    """The file of a run's metrics."""
    return run / "metrics.jsonl"


def text(row: Row) -> str:
    """A row as the file has it."""
    return json.dumps(row) + "\n"


def read(run: Path, *, tail: int | None = None) -> list[Row]:
    """The rows of a run's metrics, as `rows` has them."""
    return rows(file(run), known=lambda row: type(row.get("images")) in (int, float), tail=tail)


def reports(run: Path) -> list[Row]:
    """The last rows of a run's metrics that are reports of training, as far as they can be read."""
    with suppress(OSError):
        found = (row for row in read(run, tail=_TAIL) if type(row.get("time")) in (int, float))
        return [row for row in found if not any(name.startswith(_MEASURED) for name in row)]
    return []


def usual_gap(rows: Sequence[Row]) -> float:
    """The median time between two of the last rows, in seconds; 0.0 when it is unknown."""
    times = [row["time"] for row in rows[-20:]]
    gaps = [b - a for a, b in pairwise(times)]
    return statistics.median_high(gaps) if gaps else 0.0


def rows(file: Path, *, known: Callable[[Row], bool], tail: int | None = None) -> list[Row]:
    """The rows of a file that are `known`, without those that are torn or still being written.

    None where there is no file. With `tail`, those in so many bytes at its end: it may be long.
    """
    if not file.exists():
        return []
    with file.open("rb") as stream:
        first = max(stream.seek(0, os.SEEK_END) - tail, 0) if tail is not None else 0
        stream.seek(first)
        lines = stream.read().decode(errors="replace").splitlines()
    found = []
    for line in lines[first > 0 :]:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and known(row):
                found.append(row)
    return found
