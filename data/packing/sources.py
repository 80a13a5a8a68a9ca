"""Where images come from before they are packed: a source lists its images and reads one.

The process that plans lists them once; the processes that make shards read them. An image's name
contains all that reading needs, so that a plan can be sent to any process or node.
"""

import hashlib
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import MANIFEST, is_manifest
from data.packing.claim import WORK
from data.packing.dataset_json import DATASET_JSON, by_dataset_json
from data.packing.layout import by_directory
from data.packing.listing import Listing
from data.packing.names import LINK_UP, is_image
from data.progress import with_progress
from data.transforms import png

# Size in bytes and modification time in ns of a file, by which changes are noticed.
Stamp = tuple[int, int]


class Source(ABC):
    """A place that images can be listed and read from."""

    #: Whether images have file names, from which classes can be taken.
    has_names = False
    #: The directory of all files. Absent: there are no files.
    root: Path | None = None
    #: The files that hold many images each; none where each image is a file.
    files: Sequence[Path] = ()

    @abstractmethod
    def listing(self) -> Listing:
        """All images, in an order that depends on nothing but the source.

        Raises:
            ValueError, OSError: the source cannot be listed in full, or holds what is no dataset.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of one image file.

        Raises:
            ValueError: it is damaged within its archive.
            OSError: it cannot be read.
        """

    def stage(self) -> None:  # noqa: B027 (most sources need nothing)
        """Unpack what cannot be read in place; called once, after the plan is on disk."""

    def holder(self, name: str) -> str:
        """The file that holds an image, relative to `root`: the image file, or its archive."""
        return ""

    def stamp(self, holder: str) -> Stamp | None:
        """Size and time of that file, to notice changes; None if the source has no files.

        Raises:
            OSError: it is missing or out of reach.
        """
        return stamp_of(self.root / holder) if self.root else None


def stamp_of(path: Path) -> Stamp:
    """Size and time of the last change of a file; OSError where it is out of reach."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def unpacked_name(path: Path) -> str:
    """A name for the unpacked content of a file, which differs if path, size or time differ."""
    return hashlib.sha256(os.fsencode(f"{path.resolve()} {stamp_of(path)}")).hexdigest()[:16]


class Folder(Source):
    """Image files in a directory tree; the class is the first directory's name."""

    has_names = True

    def __init__(self, root: Path) -> None:
        self.root: Path = root

    def listing(self) -> Listing:
        """As `Source.listing`."""
        paths = with_progress(
            self.paths(), said=lambda step: f"listed {step.done} names in {self.root}"
        )
        listing = by_directory(paths, where=str(self.root))
        if (labels := self.root / DATASET_JSON).is_file():
            listing = by_dataset_json(listing, labels.read_bytes(), where=str(self.root))
        return listing

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        path = self.root / name
        if not path.is_file() and path.exists() and not path.is_dir():
            raise ValueError("it is a named pipe, a socket or a device, not a file")
        return path.read_bytes()

    def holder(self, name: str) -> str:
        """As `Source.holder`: itself."""
        return name

    def paths(self) -> Iterator[str]:
        """Paths below the root, directories with a trailing slash, except in packed datasets."""
        walk = os.walk(self.root, followlinks=True, onerror=self._refuse)
        for directory, directories, names in walk:
            inside = Path(directory).relative_to(self.root)
            if inside.parts and _is_packed(Path(directory), {*directories, *names}):
                directories.clear()
                continue
            for name in [name for name in directories if _leads_up(Path(directory, name))]:
                directories.remove(name)
                yield (inside / f"{name}{LINK_UP}").as_posix()
            if inside.parts:
                yield f"{inside.as_posix()}/"
            yield from ((inside / name).as_posix() for name in names)

    def _refuse(self, error: OSError) -> None:
        """Raise for a directory that cannot be listed: its images would be missing."""
        inside = Path(os.fspath(error.filename)).relative_to(self.root)
        raise ValueError(
            f"SOURCE = {self.root}: the directory {inside} cannot be listed "
            f"({error.strerror}): make it readable, or move it out of SOURCE"
        ) from None


class OneFile(Source):
    """Images that one file holds all of."""

    def __init__(self, path: Path) -> None:
        self._path, self.root, self.files = path, path.parent, (path,)

    def holder(self, name: str) -> str:
        """As `Source.holder`: the file."""
        return self._path.name


class Zip(OneFile):
    """Image files in a zip archive; the class is the first directory's name."""

    has_names = True

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"SOURCE = {self._path} is damaged: {error}") from None

    @cached_property
    def _names(self) -> dict[str, str]:
        """The zip's name for each path: some programs on Windows write backslashes."""
        names = self._archive.namelist()
        if any("/" in name for name in names):
            return {name: name for name in names}
        return {name.replace("\\", "/"): name for name in names}

    def listing(self) -> Listing:
        """As `Source.listing`."""
        listing = by_directory(self._names, where=str(self._path))
        if DATASET_JSON in self._names:
            content = self._archive.read(DATASET_JSON)
            listing = by_dataset_json(listing, content, where=str(self._path))
        if replaced := len(self._archive.infolist()) - len(self._names):
            skipped = Counter(listing.skipped) + Counter({"replaced in the zip": replaced})
            listing = replace(listing, skipped=skipped)
        return listing

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        try:
            return self._archive.read(self._names.get(name, name))
        except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            # It is missing, encrypted, compressed by an unknown method, or damaged.
            raise ValueError(str(error)) from None


class Lmdb(OneFile):
    """LSUN's layout: a database of one category, image files by key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "data.mdb")

    def listing(self) -> Listing:
        """As `Source.listing`."""
        with _database(self._path.parent).begin() as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
        return Listing(names=keys, labels=[0] * len(keys), classes=(self._path.parent.name,))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        with _database(self._path.parent).begin() as transaction:
            found = transaction.get(name.encode("latin-1"))
        if found is None:
            raise ValueError("it is no longer there")
        return bytes(found)


class Archives(Source):
    """Files of one directory that hold many images each; a name begins with `FILE@`."""

    def __init__(self, files: list[Path], *, pattern: str = "*", staging: Path) -> None:
        self.files, self._pattern, self._staging = files, pattern, staging
        self.root: Path = files[0].parent

    def holder(self, name: str) -> str:
        """As `Source.holder`: the archive."""
        return name.partition("/")[0].rpartition("@")[0]


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0..16 spread over 0..255."""

    def listing(self) -> Listing:
        """As `Source.listing`."""
        labels = [int(label) for label in _digits()[1]]
        names = [f"{i:04d}" for i in range(len(labels))]
        return Listing(names=names, labels=labels, classes=tuple("0123456789"))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        grey = np.round(_digits()[0][int(name)] * 255 / 16).astype(np.uint8)
        return png(np.repeat(grey[:, :, None], 3, axis=2))


def read_extent(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from byte `offset` on."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _is_packed(directory: Path, names: set[str]) -> bool:
    """Whether a directory that holds `names` is a packed dataset, such as OUT within SOURCE."""
    is_ours = WORK in names or (MANIFEST in names and is_manifest(directory / MANIFEST))
    return is_ours and not any(is_image(name) for name in names)


def _leads_up(path: Path) -> bool:
    """Whether a path is a link to a directory that contains it, which would be an endless walk."""
    return path.is_symlink() and path.resolve() in (here := path.parent.resolve(), *here.parents)


@cache
def _database(path: Path) -> Any:
    """The database, opened once in a process: lmdb cannot open it a second time."""
    import lmdb  # optional: only this source needs it

    return lmdb.open(str(path), readonly=True, lock=False, readahead=False)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    digits = load_digits()
    return digits.images, digits.target
