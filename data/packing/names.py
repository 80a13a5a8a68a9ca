"""What a file is, by its name: an image, litter (left by a system or tool), or something else."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# The usual formats. In a sample of a tar, such a file is the image and others are masks etc.
USUAL_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
# All formats that Pillow opens.
IMAGE_SUFFIXES = (
    *USUAL_SUFFIXES,
    *("apng", "avif", "dib", "gif", "j2k", "jfif", "jp2", "jpe", "mpo", "pbm", "pcx", "pgm", "pnm"),
    *("qoi", "tga", "tif", "tiff"),
)

_ENDS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)

# The names of splits, also with a year.
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([_-]?\d+)?", re.I)

# Ends the listed name of a link to a directory above it, which is counted and not followed.
LINK_UP = ".link-to-a-directory-above"

# What systems and tools leave beside data, apart from names that begin with a dot.
_LITTER = {
    "$RECYCLE.BIN",
    "@eaDir",
    "__MACOSX",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "System Volume Information",
    "Thumbs.db",
}


def is_image(name: str) -> bool:
    """Whether a name is that of an image file."""
    return name.lower().endswith(_ENDS)


def composed(text: str) -> str:
    """A text in composed Unicode; macOS stores letters and their accents separately."""
    return unicodedata.normalize("NFC", text)


def litter(name: str) -> str | None:
    """The part of a path that marks it as left by a system or tool, or None."""
    parts = (part for part in name.split("/") if part.strip("."))
    return next((part for part in parts if part[0] == "." or part in _LITTER), None)


def kind(name: str) -> str:
    """The kind by which a skipped file is counted: its litter, or its suffix."""
    found = litter(name) or PurePosixPath(name).suffix.lower() or "without a suffix"
    return "._*" if found.startswith("._") else found  # of macOS, one beside each file


def images_among(names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """The images among names of files, sorted, and how many others there are of each kind."""
    images, others = [], Counter[str]()
    for name in names:
        if is_image(name) and not litter(name):
            images.append(name)
        else:
            others[kind(name)] += 1
    return sorted(images), others


def first_of(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
