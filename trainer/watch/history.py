"""Rows of JSON in a run: `metrics.jsonl` has one for each report, validation and evaluation.

No torch here.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def file(run: Path) -> Path:
    """The file of a run's metrics."""
    return run / "metrics.jsonl"


def text(row: Row) -> str:
    """A row as the file has it."""
    return json.dumps(row) + "\n"


def read(run: Path, *, tail: int | None = None) -> list[Row]:
    """The rows of a run's metrics, as `rows` has them."""
    return rows(file(run), known=lambda row: type(row.get("images")) in (int, float), tail=tail)


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
