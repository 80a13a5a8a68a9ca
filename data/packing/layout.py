"""The classes of a source, from the names of its directories or tars."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from data.manifest import NO_CLASS
from data.packing.listing import Listing, by_directory_name
from data.packing.names import SPLIT, composed, images_among, litter

# Names of tars and directories that number the parts of a dataset and say nothing of classes.
_SHARD = re.compile(r"(.*(shard|part|chunk).*)?[\d_-]+", re.IGNORECASE)
_NUMBERED = re.compile(r".*\d")


def by_directory(names: Iterable[str], *, where: str) -> Listing:
    """The images among `names`, with their directories as classes.

    Names that end with a slash are directories. Litter (`data.packing.names`) is skipped.
    """
    files: list[str] = []
    directories: list[str] = []
    for name in names:
        (directories if name.endswith("/") else files).append(name)
    images, skipped = images_among(files)
    beside = {f"{name.rpartition('/')[0]}/" for name in files}
    classes, fault = class_directories(images, directories={*directories, *beside}, where=where)
    return replace(by_directory_name(images, classes), skipped=skipped, fault=fault)


def class_directories(
    images: Sequence[str], *, directories: Iterable[str], where: str
) -> tuple[list[str], str]:
    """The class of each image, and why the directories cannot be classes, or "".

    The class is the first directory of the path; where all images lie in directories of one
    directory, it is the first one below that.
    """
    parts = [name.split("/")[:-1] for name in images]
    common = _in_common(parts)
    above = common if all(len(part) > common for part in parts) else 0
    classes = [part[above] if len(part) > above else NO_CLASS for part in parts]
    root = "/".join((where, *parts[0][:above])) if parts else where
    fault = (
        _loose_images(images, classes, root)
        or _splits(classes, root)
        or _same_names(classes, root)
        or _empty(classes, _names_at(parts[0][:above] if parts else [], directories), root)
        or _loose_in_only_directory(images, parts, where)
    )
    return classes, fault


def _in_common(parts: list[list[str]]) -> int:
    """How many leading directories all images share."""
    ends = zip(min(parts, default=[]), max(parts, default=[]), strict=False)
    return sum(1 for _ in takewhile(lambda end: end[0] == end[1], ends))


def _names_at(above: list[str], directories: Iterable[str]) -> set[str]:
    """The names of directories that lie in `above`."""
    depth, found = len(above), set()
    for directory in directories:
        part = directory.strip("/").split("/")
        if len(part) > depth and part[:depth] == above and not litter(directory):
            found.add(part[depth])
    return found - {""}


def _loose_images(images: Sequence[str], classes: list[str], root: str) -> str:
    """The fault of images that lie beside class directories, or ""."""
    loose = [name for name, of in zip(images, classes, strict=True) if of == NO_CLASS]
    if not 0 < len(loose) < len(images):
        return ""
    return (
        f"SOURCE = {root}: {len(loose)} images, such as {loose[0]}, lie beside the class "
        "folders: move them into a class folder or out of SOURCE, or give --class-map"
    )


def _loose_in_only_directory(images: Sequence[str], parts: list[list[str]], where: str) -> str:
    """As `_loose_images`, for images beside the class directories in the only top directory."""
    common = _in_common(parts)
    inner = [part[common] if len(part) > common else NO_CLASS for part in parts]
    if len({*inner} - {NO_CLASS}) < 2:
        return ""
    return _loose_images(images, inner, "/".join((where, *parts[0][:common])))


def _splits(classes: list[str], root: str) -> str:
    """The fault of directories that are splits, or ""."""
    names = sorted({*classes} - {NO_CLASS})
    if len(names) < 2 or not all(SPLIT.fullmatch(name) for name in names):
        return ""
    one = next((name for name in names if name.lower().startswith("train")), names[0])
    unpack = "" if os.path.isdir(root) else "unpack it and "
    return (
        f"SOURCE = {root} holds the splits {', '.join(names)}, not classes: {unpack}pack each by "
        f"itself, first {root}/{one}, then the others with --classes-of"
    )


def _empty(classes: list[str], directories: set[str], root: str) -> str:
    """The fault of class directories without an image, or ""."""
    empty = sorted(directories - {*classes})
    if not empty or set(classes) <= {NO_CLASS}:
        return ""
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    return (
        f"SOURCE = {root}: no image in the class folders {', '.join(empty[:5])}{more}: "
        "add their images or remove them"
    )


def _same_names(classes: list[str], root: str) -> str:
    """The fault of two names for one class: in two forms of Unicode, or 1 and 01; or ""."""
    are_numbers = all(name.isdecimal() for name in classes)
    spelled: dict[int | str, str] = {}
    for name in sorted({*classes}):
        key = int(name) if are_numbers else composed(name)
        other = spelled.setdefault(key, name)
        if other != name and not are_numbers:
            return (
                f"SOURCE = {root}: the class folders {other!a} and {name!a} have the "
                "same name in two forms of Unicode: merge or rename them"
            )
        if other != name:
            return (
                f"SOURCE = {root}: the class folders {other} and {name} are the same number: "
                "merge or rename them"
            )
    return ""


def classes_of_tars(tars: Sequence[Path], members: list[list[str]]) -> Listing | None:
    """The classes of tars whose images have no labels, or None.

    `members` are the names of the images in each tar. The classes are the directories in the tars,
    if there are several and their names are not those of shards; where there are no directories,
    the tars themselves, if they are not numbered.
    """
    names = [name.removeprefix("./") for each in members for name in each]
    classes, fault = class_directories(names, directories=(), where=str(tars[0].parent))
    found, stems = {*classes}, [tar.stem for tar in tars]
    if found == {NO_CLASS} and _are_classes(stems, members):
        named = [tar.stem for tar, each in zip(tars, members, strict=True) for _ in each]
        return by_directory_name(names, named)
    are_shards = found <= {*stems} and all(_SHARD.fullmatch(name) for name in found)
    if len(found) < 2 or NO_CLASS in found or are_shards:
        return None
    return replace(by_directory_name(names, classes), fault=fault)


def _are_classes(stems: list[str], members: list[list[str]]) -> bool:
    """Whether each tar is a class, as n01440764.tar and so on of ILSVRC."""
    if len(stems) < 2 or all(_SHARD.fullmatch(stem) for stem in stems):
        return False  # also img2dataset's images have names that begin with that of their tar
    pairs = zip(stems, members, strict=True)
    if all(name.startswith(stem) for stem, each in pairs for name in each):
        return True
    return not any(_SHARD.fullmatch(stem) or _NUMBERED.fullmatch(stem) for stem in stems)
