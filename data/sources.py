"""Where images come from before they are packed: a source lists its images and reads one.

The planning process lists them once; whichever process makes a shard reads them. A name contains
all that reading needs, so that a plan can be sent to any process or node.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from data.claim import WORK
from data.layout import by_directory
from data.listing import Listing
from data.manifest import MANIFEST
from data.names import is_image


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
        return by_directory(self._names(), where=str(self.root))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        return (self.root / name).read_bytes()

    def _names(self) -> Iterator[str]:
        for directory, directories, names in os.walk(self.root, followlinks=True):
            inside = Path(directory).relative_to(self.root)
            if inside.parts and _is_packed({*directories, *names}):
                directories.clear()
                continue
            if inside.parts:
                yield f"{inside.as_posix()}/"
            yield from ((inside / name).as_posix() for name in names)


class Zip:
    """Image files in a zip archive; the class is the first directory's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"SOURCE = {path} is damaged: {error}") from None

    def listing(self) -> Listing:
        """As `Source.listing`."""
        return by_directory(self._archive.namelist(), where=str(self._path))

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


def _is_packed(names: set[str]) -> bool:
    """Whether a directory with these names is a packed dataset, such as OUT within SOURCE."""
    return bool({WORK, MANIFEST} & names) and not any(is_image(name) for name in names)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    digits = load_digits()
    return digits.images, digits.target
