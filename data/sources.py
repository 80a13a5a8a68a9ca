"""Where images come from before they are packed: a source lists its images and reads one.

The planning process lists them once; whichever process makes a shard reads them. A name contains
all that reading needs, so that a plan can be sent to any process or node.
"""

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from data.manifest import NO_CLASS
from data.tars import IMAGE_SUFFIXES, all_or_no_labels

# Classes named by numbers below this have these labels; larger numbers are dates and the like.
_MOST_CLASSES = 65536


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All images of a source: their names there, their labels, and the names of the labels."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]


class Source(Protocol):
    """A place that images can be listed and read from."""

    def listing(self) -> Listing:
        """All images, in an order that depends on nothing but the source."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of one image file."""
        ...


class Folder:
    """Image files in a directory tree; the class is the first directory's name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self) -> Listing:
        """As `Source.listing`."""
        return by_first_directory(self._names())

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        return (self.root / name).read_bytes()

    def _names(self) -> Iterator[str]:
        for directory, _, names in os.walk(self.root, followlinks=True):
            inside = Path(directory).relative_to(self.root)
            yield from ((inside / name).as_posix() for name in names)


class Zip:
    """Image files in a zip archive; the class is the first directory's name."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"SOURCE = {path} is damaged: {error}") from None

    def listing(self) -> Listing:
        """As `Source.listing`."""
        return by_first_directory(self._archive.namelist())

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        return self._archive.read(name)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0..16 spread over 0..255."""

    def listing(self) -> Listing:
        """As `Source.listing`."""
        labels = [int(label) for label in _digits()[1]]
        names = [f"{i:04d}" for i in range(len(labels))]
        return Listing(names=names, labels=labels, classes=tuple("0123456789"))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        grey = np.round(_digits()[0][int(name)] * 255 / 16).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)).save(buffer, format="PNG")
        return buffer.getvalue()


def by_first_directory(names: Iterable[str]) -> Listing:
    """The images among `names`, with their first directories, sorted, as classes."""
    images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    return by_class_name(images, [n.split("/", 1)[0] if "/" in n else NO_CLASS for n in images])


def by_class_name(names: list[str], classes: list[str]) -> Listing:
    """A listing from the name of each image's class; labels count the names in sorted order.

    Where all names are numbers, they are the labels.
    """
    if classes and all(name.isdecimal() and int(name) < _MOST_CLASSES for name in classes):
        return by_number(names, [int(name) for name in classes])
    known = tuple(sorted(set(classes)))
    label = {name: i for i, name in enumerate(known)}
    return Listing(names=names, labels=[label[c] for c in classes], classes=known)


def by_number(names: list[str], labels: list[int]) -> Listing:
    """A listing whose labels are numbers already: they stay as they are."""
    classes = tuple(str(i) for i in range(max(labels, default=-1) + 1))
    return Listing(names=names, labels=labels, classes=classes)


def by_number_if_any(names: list[str], labels: list[int | None]) -> Listing:
    """As `by_number`; or without labels, where no image has one.

    Raises:
        ValueError: some images have a label.
    """
    known = all_or_no_labels(names, labels)
    if None in labels:
        return Listing(names=names, labels=known, classes=(NO_CLASS,))
    return by_number(names, known)


def relabel(listing: Listing, *, class_map: Path) -> Listing:
    """Take classes from a file of lines.

    They are `NAME CLASS`, names with or without directories; or one `CLASS` for each image, in the
    order of the names, as in the label files of validation sets.

    Raises:
        ValueError: the map cannot be read, or an image is not in it.
    """
    lines = _read_words(class_map)
    if all(len(words) == 1 for words in lines):
        if len(lines) != len(listing.names):
            raise ValueError(
                f"--class-map = {class_map} has {len(lines)} labels for {len(listing.names)} images"
            )
        return by_class_name(listing.names, [words[0] for words in lines])
    for words in lines:
        if len(words) != 2:
            raise ValueError(f"--class-map = {class_map}: {' '.join(words)!r}: must be NAME CLASS")
    found = dict(lines)
    classes = []
    for name in listing.names:
        label = found.get(name, found.get(name.rsplit("/", 1)[-1]))
        if label is None:
            raise ValueError(f"--class-map = {class_map} has no class for {name}; add its line")
        classes.append(label)
    return by_class_name(listing.names, classes)


def renumber(listing: Listing, *, classes: tuple[str, ...]) -> Listing:
    """Number the classes as another dataset does, e.g. a validation split as its training split.

    Classes that are numbers already are taken to be the other dataset's labels.

    Raises:
        ValueError: a class that the other one does not have, or images without a label.
    """
    if NO_CLASS in listing.classes:
        raise ValueError("--classes-of: some images have no label; add --class-map")
    if all(name.isdecimal() for name in listing.classes) and len(listing.classes) <= len(classes):
        return Listing(names=listing.names, labels=listing.labels, classes=classes)
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in listing.classes if name not in number]
    if unknown:
        raise ValueError(f"--classes-of has no class {unknown[0]!r} ({len(unknown)} are unknown)")
    labels = [number[listing.classes[label]] for label in listing.labels]
    return Listing(names=listing.names, labels=labels, classes=classes)


def _read_words(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"--class-map = {path} cannot be read: {error}") from None
    return [line.replace(",", " ").split() for line in lines if line.strip()]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    digits = load_digits()
    return digits.images, digits.target
