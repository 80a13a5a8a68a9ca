"""Classes from a table of NAME and CLASS (`--class-map`), or from paths (`--class-from`).

A table may have a header, quotes, an index column, the class first, or names without suffix. The
column of names is the one with the names of the source's images; an ambiguous table is refused.
"""

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data import files
from data.manifest import NO_CLASS
from data.packing.labels import checked_classes
from data.packing.layout import class_directories
from data.packing.listing import Listing, by_directory_name
from data.packing.names import composed

# The names of columns that hold a class, in the order in which they are preferred.
_CLASS_COLUMNS = ("label", "class", "class_id", "category", "target", "cls", "wnid", "y")
# Kaggle's list of boxes, each a class and four numbers.
_BOXES = re.compile(r"(\S+(?: -?\d+){4} *)+")
# What only a path has: a directory or a suffix.
_FILE = re.compile(r"/|\.\w{2,5}$")
# Separators of name and class that are not supported.
_MARK = re.compile(r"[:|=]")
# `FILE@OFFSET+SIZE/` before the path of an image in a tar.
_TAR = re.compile(r"[^/]*@\d+\+\d+/")

_Rows = list[list[str]]


def relabel(listing: Listing, *, class_map: Path, source: str) -> Listing:
    """Take classes from a file of `NAME CLASS`, or of one `CLASS` for each image in their order.

    Names are relative to `source` or to a directory above it, or absolute.

    It may be a table with a header, separated by commas, semicolons, tabs or spaces, or lines of
    JSON, as Hugging Face's `metadata.jsonl`.

    Raises:
        ValueError: the file cannot be read or understood, or an image is not in it.
    """
    rows, where = _rows(class_map), f"--class-map = {class_map}"
    if not rows:
        raise ValueError(f"{where} is empty")
    if all(len(row) == 1 for row in rows) and " " not in rows[0][0]:
        classes = _labels_alone([row[0] for row in rows], listing, where)
    else:
        classes = _classes(listing, _pairs(listing, rows, where, source=source), where)
    return _relabelled(listing, checked_classes(classes, where))


def _labels_alone(labels: list[str], listing: Listing, where: str) -> list[str]:
    """The labels of a file that has one for each image, perhaps below a title, and no names."""
    if len(labels) == len(listing.names) + 1 and labels[0].lower() in _CLASS_COLUMNS:
        del labels[0]
    if len(labels) != len(listing.names):
        raise ValueError(f"{where} has {len(labels)} labels for {len(listing.names)} images")
    known = _keys(listing)
    for label in labels:
        name = _MARK.split(label, maxsplit=1)[0].strip()
        if name in known and (name != label or _FILE.search(label)):
            raise ValueError(
                f"{where}: {label!r} begins with the name of an image: must be NAME CLASS, with a "
                "space, a tab, a comma or a semicolon between them"
            )
    return labels


def by_prefix(listing: Listing) -> Listing:
    """Take the class from an image's file name: what is before the first `_`, as in the reference.

    Raises:
        ValueError: a name has none.
    """
    names = [_member(name).rpartition("/")[2] for name in listing.names]
    for name in names:
        if not name.partition("_")[1] or name.startswith("_"):
            raise ValueError(f"--class-from prefix: {name} has no class before a `_`")
    return _relabelled(listing, [name.partition("_")[0] for name in names])


def by_directories(listing: Listing, *, where: str) -> Listing:
    """Take classes from directories, even where the images have labels."""
    members = [_member(name) for name in listing.names]
    classes, fault = class_directories(members, directories=(), where=where)
    if set(classes) == {NO_CLASS}:
        fault = f"SOURCE = {where}: no image is in a directory: choose another --class-from"
    return replace(_relabelled(listing, classes), fault=fault)


def map_content(path: Path) -> bytes:
    """The content of a class map; ValueError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--class-map = {path} cannot be read: {files.reason(error)}") from None


def _rows(path: Path) -> _Rows:
    """The cells of each line that is not empty or a comment; one, if only spaces separate them."""
    text = composed(map_content(path).decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if objects := _objects(lines):
        return objects
    marks = [mark for mark in "\t,;" if all(mark in line for line in lines)]
    rows = csv.reader(lines, delimiter=marks[0] if marks else "\x1f", skipinitialspace=True)
    try:
        return [[cell.strip().removeprefix("./") for cell in row] for row in rows]
    except csv.Error as error:
        raise ValueError(f"--class-map = {path} is no text of names and classes: {error}") from None


def _objects(lines: list[str]) -> _Rows:
    """Lines of JSON as a table with their keys as header; empty if the lines are not JSON."""
    try:
        found = [{k: v for k, v in json.loads(row).items() if v is not None} for row in lines]
    except (ValueError, AttributeError):
        return []
    names = [*{name: None for each in found for name in each}]
    rows = [[composed(str(each.get(name, ""))) for name in names] for each in found]
    return [names, *rows] if names else []


def _from_source(rows: _Rows, source: str, listing: Listing) -> _Rows:
    """The rows, with the images' paths from `source` on where they begin above it."""
    members = {composed(_member(name)) for name in listing.names}
    members |= {str(PurePosixPath(member).with_suffix("")) for member in members}
    root = composed(os.path.abspath(source))
    places = [i for i, letter in enumerate(root) if letter == "/"]
    above = [f"{root[place + 1 :]}/" for place in places] + [f"{root}/"]

    def cut(cell: str) -> str:
        rests = (cell[len(way) :] for way in above if cell.startswith(way))
        return cell if cell in members else next((r for r in rests if r in members), cell)

    return [[cut(cell) for cell in row] for row in rows]


def _pairs(listing: Listing, rows: _Rows, where: str, *, source: str) -> list[tuple[str, str]]:
    """Name and class of each row; ValueError where it is ambiguous which column is which."""
    known = _keys(listing)
    if all(len(row) == 1 for row in rows):
        rows = [_split(row[0], known) for row in rows]
    rows = _from_source(rows, source, listing)
    width = Counter(len(row) for row in rows).most_common(1)[0][0]
    for row in rows:
        if len(row) != width:
            raise ValueError(f"{where}: {' '.join(row)!r}: must be NAME CLASS, as the other lines")
    name = _name_column([*zip(*rows, strict=True)], listing, known, where)
    header = rows[0] if rows[0][name] not in known and not _FILE.search(rows[0][name]) else None
    rows = rows[1:] if header else rows
    others = [column for column in range(width) if column != name]
    label = _class_column([[row[i] for row in rows] for i in others], others, header)
    if label is None:
        raise ValueError(
            f"{where}: one of {len(others)} columns beside the names may be the class: keep one, "
            "or name it `label` in a header"
        )
    return [(row[name], _without_boxes(row[label], where)) for row in rows]


def _name_column(
    columns: Sequence[tuple[str, ...]], listing: Listing, known: set[str], where: str
) -> int:
    """The number of the column with the most names of images, with suffix before without.

    A column of numbers may be names without suffix, classes, or line numbers.

    Raises:
        ValueError: no column has names, or it is ambiguous which one.
    """
    names = {composed(_member(name)) for name in listing.names}
    files = names | {name.rpartition("/")[2] for name in names}
    hits = [(sum(c in files for c in cells), sum(c in known for c in cells)) for cells in columns]
    if max(hits) == (0, 0):
        raise ValueError(f"{where} has no column of names of images, such as {listing.names[0]}")
    best = [i for i, found in enumerate(hits) if found == max(hits)]
    best = [i for i in best if len({*columns[i]}) == len(columns[i])] or best
    best = [i for i in best if columns[i][0].lower() not in _CLASS_COLUMNS] or best
    if len(columns) > 2:  # one names, one has the class, and another may count
        best = [i for i in best if not _counts_lines(columns[i])] or best
    if len(best) > 1 and all(cell.isdecimal() for i in best for cell in columns[i][1:]):
        raise ValueError(
            f"{where}: columns {best[0] + 1} and {best[1] + 1} may both be names of images: give "
            f"the names with their suffix, such as {listing.names[0]}"
        )
    return best[0]


def _counts_lines(cells: Sequence[str]) -> bool:
    """Whether a column has line numbers, from 0 or 1, with or without a header."""
    return any(
        [*left] == [str(i + first) for i in range(len(left))]
        for left in (cells, cells[1:])
        for first in (0, 1)
    )


def _class_column(
    columns: Sequence[list[str]], numbers: list[int], header: list[str] | None
) -> int | None:
    """The number of the column with the classes, by its title, or as the only one left; or None."""
    if len(columns) == 1:
        return numbers[0]
    titles = [title.lower() for title in header or []]
    for title in _CLASS_COLUMNS:
        if title in titles:
            return titles.index(title)
    left = [n for n, cells in zip(numbers, columns, strict=True) if not _counts_lines(cells)]
    return left[0] if len(left) == 1 else None


def _classes(listing: Listing, pairs: list[tuple[str, str]], where: str) -> list[str]:
    """The class of each image of the listing."""
    found: dict[str, str] = {}
    for name, label in pairs:
        if name in found:
            raise ValueError(f"{where} has {name} twice: keep one of its lines")
        found[name] = label
    members = [_member(name) for name in listing.names]
    count = Counter(key for member in members for key in _names_of(member))
    classes, used = [], set()
    for member in members:
        key = next((key for key in _names_of(member) if key in found), None)
        if key is None:
            raise ValueError(f"{where} has no class for {member}; add its line")
        if count[key] > 1:
            raise ValueError(
                f"{where}: {key} is the name of {count[key]} images, such as {member}: "
                "give names with directories"
            )
        used.add(key)
        classes.append(found[key])
    say_unused(len(found) - len(used), "lines", where)
    return classes


def say_unused(count: int, what: str, where: str) -> None:
    """Print how many entries of a file name no image of the source."""
    if count:
        print(f"{where}: {count} {what} are of no image in SOURCE", file=sys.stderr)


def _keys(listing: Listing) -> set[str]:
    return {key for name in listing.names for key in _names_of(_member(name))}


def _names_of(member: str) -> list[str]:
    """The names that a table may have for an image: with or without directories and suffix."""
    member = composed(member)
    path = PurePosixPath(member)
    return list(dict.fromkeys((member, str(path), path.name, str(path.with_suffix("")), path.stem)))


def _member(name: str) -> str:
    """The path of an image within its tar; a name in another source is a path already."""
    return _TAR.sub("", name, count=1).removeprefix("./")


def _split(line: str, known: set[str]) -> list[str]:
    """NAME and CLASS of a line that spaces separate: one of the two may have spaces itself."""
    words = line.split()
    if len(words) == 2:
        return words
    for at in range(1, len(words)):
        left, right = " ".join(words[:at]), " ".join(words[at:])
        if left in known or right in known:
            return [left, right]
    return words


def _without_boxes(cell: str, where: str) -> str:
    """The class in a cell with Kaggle's boxes, which must agree; other cells are returned as is."""
    if not _BOXES.fullmatch(cell):
        return cell
    classes = {*cell.split()[::5]}
    if len(classes) > 1:
        raise ValueError(f"{where}: {cell!r:.60} has boxes of several classes")
    return classes.pop()


def _relabelled(listing: Listing, classes: list[str]) -> Listing:
    return replace(by_directory_name(listing.names, classes), skipped=listing.skipped)
