"""Splits: recognising them in the names of files, and holding out a part of a source."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from data.packing.listing import Listing
from data.packing.names import SPLIT

Split = Literal["train", "val"]
# The share of each class that --split holds out of training, by default.
VAL_SHARE = 0.1

_PART = re.compile(r"(?P<head>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<tail>.*)")


def check_files(files: Sequence[Path], *, pattern: str) -> None:
    """Raise ValueError unless the files of a pattern are of one split and none is missing."""
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
    """The splits in the names of files, if there are several of them."""
    found = {frozenset(_splits(name)) for name in names} - {frozenset()}
    return sorted(set().union(*found)) if len(found) > 1 else []


def _splits(name: str) -> list[str]:
    return [word for word in re.split(r"[-_.]", name.lower()) if SPLIT.fullmatch(word)]


def _missing(names: Iterable[str]) -> list[str]:
    """The names of files that are missing among `HEAD-0-of-N`, `HEAD-1-of-N` and so on."""
    sets: dict[tuple[str, str], list[re.Match[str]]] = {}
    for part in filter(None, map(_PART.fullmatch, names)):
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


def split_of(listing: Listing, split: Split, *, held_out: float) -> Listing:
    """The images to train on, or the share `held_out` of each class, chosen by hashes of names.

    Of a class with two or more images, at least one is held out and one is left. When the source
    grows, nearly all images stay in their split.

    Raises:
        ValueError: no image can be held out.
    """
    of_class: dict[int, list[int]] = {}
    for i, label in enumerate(listing.labels):
        of_class.setdefault(label, []).append(i)
    out: set[int] = set()
    for members in of_class.values():
        count = min(max(round(len(members) * held_out), 1), len(members) - 1)
        out.update(sorted(members, key=lambda i: _hash(listing.names[i]))[:count])
    if not out:
        raise ValueError(f"--split {split}: no class has two images, one of which can be held out")
    chosen = [i for i in range(len(listing.names)) if (i in out) is (split == "val")]
    names, labels = listing.names, listing.labels
    return replace(listing, names=[names[i] for i in chosen], labels=[labels[i] for i in chosen])


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()
