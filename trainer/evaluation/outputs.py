"""The files that evaluations write: a result may replace an earlier one of the same inputs only.

This is checked before anything is computed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import files
from trainer.adm.config import check


def check_place(out: Path, *, suffix: str, kind: str, earlier: Mapping[str, Any] | None) -> None:
    """Return if a result may be written to this path.

    `earlier` is what is known of a result that is there; None where none is.

    Raises:
        ValueError: the path has another suffix, or something else is there.
    """
    check(out.suffix == suffix, "--out", str(out), f"a file that ends in {suffix}")
    check(not out.is_dir(), "--out", str(out), "no directory")
    if out.exists() and earlier is None:
        raise ValueError(f"{out} exists and is no {kind}: name another --out, or remove it")
    files.check_parent(out, option="--out")


def write(out: Path, text: str) -> None:
    """Write a result; its directory is made."""
    files.make_parent(out, option="--out")
    files.write(out, text)


def check_same(out: Path, earlier: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where the `earlier` result differs from what is `wanted` in an entry."""
    for name, value in wanted.items():
        if earlier is not None and earlier.get(name) != value:
            raise ValueError(
                f"{out} exists with other results ({name} was {earlier.get(name)}, is {value}): "
                "name another --out, or rename that file"
            )


def stored_json(out: Path) -> dict[str, Any] | None:
    """The JSON object in a .json file; None where there is none."""
    try:
        found = json.loads(out.read_bytes()) if out.suffix == ".json" else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
