"""What the names of a dataset's files say: their splits, and how many files there must be."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from data.packing.names import SPLIT

_PART = re.compile(r"(?P<head>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<tail>.*)")


def check_files(files: list[Path], *, pattern: str) -> None:
    """Check that the files that match a pattern are of one split and none is missing.

    Raises:
        ValueError: they are not.
    """
    parent, names = files[0].parent, [file.name for file in files]
    if found := splits_among(names):
        one = "train" if "train" in found else found[0]
        raise ValueError(
            f"SOURCE = {parent} holds the splits {', '.join(found)}: give one, such as "
            f"'{parent}/*{one}*{files[0].suffix}'"
        )
    missing = [name for name in _missing(names) if fnmatch(name, pattern)]
    if missing:
        raise ValueError(
            f"SOURCE = {parent}: {len(missing)} files are missing, such as {missing[0]}: "
            "add them, or give a pattern that leaves them out"
        )


def splits_among(names: Iterable[str]) -> list[str]:
    """The splits that files are named after, if these are several."""
    found = {frozenset(_splits(name)) for name in names} - {frozenset()}
    return sorted(set().union(*found)) if len(found) > 1 else []


def _splits(name: str) -> list[str]:
    return [word for word in re.split(r"[-_.]", name.lower()) if SPLIT.fullmatch(word)]


def _missing(names: Iterable[str]) -> list[str]:
    """The names of files that are missing among `HEAD-0-of-N`, `HEAD-1-of-N` and so on."""
    parts = [part for part in map(_PART.fullmatch, names) if part]
    sets: dict[tuple[str, str], list[re.Match[str]]] = {}
    for part in parts:
        sets.setdefault((part["head"], part["count"]), []).append(part)
    missing = []
    for (head, count), present in sets.items():
        numbers = {int(part["number"]) for part in present}
        first = int(0 not in numbers and int(count) in numbers)
        digits, tail = len(present[0]["number"]), present[0]["tail"]
        missing += [
            f"{head}{number:0{digits}d}-of-{count}{tail}"
            for number in range(first, first + int(count))
            if number not in numbers
        ]
    return missing
