"""The files that evaluations write: a result may replace an earlier one of the same, nothing else.

What is in the place of an output is checked before anything is computed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import files
from trainer.adm.config import check


def check_place(out: Path, *, suffix: str, kind: str, earlier: Mapping[str, Any] | None) -> None:
    """Return if an output may be written to this path by `write`.

    `earlier` is the result that is there, None where nothing is or something else.

    Raises:
        ValueError: the path is of another kind of file, or holds something else.
    """
    check(out.suffix == suffix, "--out", str(out), f"a file that ends in {suffix}")
    check(not out.is_dir(), "--out", str(out), "no directory")
    if out.exists() and earlier is None:
        raise ValueError(f"{out} exists and is no {kind}: name another --out, or remove it")
    files.check_parent(out, option="--out")


def write(out: Path, text: str) -> None:
    """Write a result, and make its directory."""
    files.make_parent(out, option="--out")
    files.write(out, text)


def check_same(out: Path, earlier: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where a result is there that is of something else than what is `wanted`."""
    for name, value in wanted.items():
        if earlier is not None and earlier.get(name) != value:
            raise ValueError(
                f"{out} exists with other results ({name} was {earlier.get(name)}, is {value}): "
                "name another --out, or rename that file"
            )


def stored_json(out: Path) -> dict[str, Any] | None:
    """The JSON object in a .json; None where there is no such file, or none in it."""
    try:
        found = json.loads(out.read_bytes()) if out.suffix == ".json" else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
