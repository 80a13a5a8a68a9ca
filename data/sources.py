"""Where images come from before they are packed: a source lists its items and reads one.

Listing happens once, in the planning process; reading happens wherever a shard is made. An item
carries all that reading needs, so that a plan can be sent to any process or node.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a source: its name there, and its class by name."""

    name: str
    label: str


class Source(Protocol):
    """A place that images can be listed and read from."""

    def items(self) -> list[Item]:
        """All images, in an order that depends on nothing but the source."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of one image file."""
        ...


def open_source(text: str) -> Source:
    """The source that the command line means.

    Raises:
        ValueError: nothing of the known kinds is there.
    """
    if text == "digits":
        return Digits()
    if Path(text).is_dir():
        return Folder(Path(text))
    raise ValueError(f"SOURCE = {text} is neither an image folder nor `digits`")


class Folder:
    """Image files in a directory tree; the class is the first directory's name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def items(self) -> list[Item]:
        return [_item_of_path(name) for name in sorted(self._names()) if _is_image(name)]

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def _names(self) -> Iterable[str]:
        for path in self.root.rglob("*"):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path.relative_to(self.root).as_posix()


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0..16 spread over 0..255."""

    def items(self) -> list[Item]:
        labels = _digits()[1]
        return [Item(name=f"{i:04d}", label=str(label)) for i, label in enumerate(labels)]

    def read(self, name: str) -> bytes:
        grey = np.round(_digits()[0][int(name)] * 255 / 16).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)).save(buffer, format="PNG")
        return buffer.getvalue()


def read_class_map(path: Path) -> dict[str, str]:
    """Read lines of `NAME CLASS`: image names (with or without directories) and their classes.

    Raises:
        ValueError: the file is missing or a line has another form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"--class-map = {path} cannot be read: {error}") from None
    pairs = [line.replace(",", " ").split() for line in lines if line.strip()]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise ValueError(f"--class-map = {path}: entry {number} is not `NAME CLASS`: {pair}")
    return dict(pairs)


def relabel(items: list[Item], *, class_map: dict[str, str]) -> list[Item]:
    """Give each item the class that the map has for its name, or for its file's name.

    Raises:
        ValueError: an image is not in the map.
    """

    def label(item: Item) -> str:
        found = class_map.get(item.name, class_map.get(item.name.rsplit("/", 1)[-1]))
        if found is None:
            raise ValueError(f"--class-map has no class for {item.name}; add a line for it")
        return found

    return [Item(name=item.name, label=label(item)) for item in items]


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _item_of_path(name: str) -> Item:
    return Item(name=name, label=name.split("/", 1)[0] if "/" in name else "")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    digits = load_digits()
    return digits.images, digits.target
