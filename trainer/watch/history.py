"""`RUN/metrics.jsonl`: a row for each report, validation and evaluation of a run. No torch here."""

import json
import os
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
    """The rows, without those that are torn or still being written; none where there is no file.

    With `tail`, those in so many bytes at the end of the file, which may be long.
    """
    if not file(run).exists():
        return []
    with file(run).open("rb") as stream:
        first = max(stream.seek(0, os.SEEK_END) - tail, 0) if tail is not None else 0
        stream.seek(first)
        lines = stream.read().decode(errors="replace").splitlines()
    return [row for line in lines[first > 0 :] if (row := _parse(line)) is not None]


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and type(row.get("images")) in (int, float)
    return row if is_row else None
