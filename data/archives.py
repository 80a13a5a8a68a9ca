"""Sources that are datasets already: WebDataset tars, LSUN's lmdb; and which kind a path is."""

import os
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from data.labels import Label
from data.layout import class_directories
from data.listing import Listing, by_directory_name, by_label_if_any
from data.manifest import NO_CLASS
from data.names import is_image, litter
from data.parquet import Parquet
from data.sources import Archives, Digits, Folder, Source, Stamp, Zip, read_extent, stamp_of
from data.tars import scan_tar


def open_source(text: str, *, staging: Path) -> Source:
    """The source at a path of the command line; parquet is unpacked into `staging`.

    Raises:
        ValueError: there is nothing of the known kinds.
    """
    path = Path(text)
    if text == "digits":
        return Digits()
    if path.suffix == ".zip" and path.is_file():
        return Zip(path)
    if (path / "data.mdb").is_file():
        return Lmdb(path)
    for suffix, kind in ((".parquet", Parquet), (".tar", Tars)):
        if path.suffix == suffix:  # perhaps with a * in its name
            found = sorted(path.parent.glob(path.name))
        else:
            found = sorted(path.glob(f"*{suffix}"))
            if found and any(_holds_images(child) for child in path.iterdir()):
                raise ValueError(
                    f"SOURCE = {text} holds {found[0].name} and directories of images: move "
                    "one of them to another directory"
                )
        if found and all(file.is_file() for file in found):
            pattern = path.name if path.suffix == suffix else "*"
            return kind(found, pattern=pattern, staging=staging)
    if path.is_dir():
        return Folder(path)
    raise ValueError(
        f"SOURCE = {text}: must be a folder, zip, tar, parquet or lmdb of images, or `digits`"
    )


# Directories that are named after their shard, which says nothing of classes.
_SHARD = re.compile(r"(.*(shard|part|chunk).*)?[\d_-]+", re.IGNORECASE)


class Tars(Archives):
    """Existing WebDataset shards, or tars of class directories.

    Labels are in `.cls`, `.json` or `.txt`, or else the directories, if there are any.
    """

    def listing(self) -> Listing:
        """As `Source.listing`."""
        self.check_files()
        names: list[str] = []
        labels: list[Label | None] = []
        members: list[str] = []
        skipped = Counter[str]()
        for file in self._files:
            for sample in scan_tar(file, skipped=skipped):
                names.append(f"{file.name}@{sample.offset}+{sample.size}/{sample.name}")
                members.append(sample.name.removeprefix("./"))
                labels.append(sample.label)
        listing = by_label_if_any(names, labels)
        if listing.classes == (NO_CLASS,):
            listing = self._by_directory(listing, members)
        return replace(listing, skipped=skipped)

    def _by_directory(self, listing: Listing, members: list[str]) -> Listing:
        """Take several directories within the tars as classes, unless they are those of shards."""
        where = str(self._root)
        classes, fault = class_directories(members, directories=(), where=where)
        found = {*classes}
        stems = {file.stem for file in self._files}
        are_shards = found <= stems and all(_SHARD.fullmatch(name) for name in found)
        if len(found) < 2 or NO_CLASS in found or are_shards:
            return listing
        return replace(by_directory_name(listing.names, classes), fault=fault)

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, extent = name.partition("/")[0].rpartition("@")
        offset, size = map(int, extent.split("+"))
        return read_extent(self._root / file, offset, size)


class Lmdb(Source):
    """LSUN's layout: a database of one category, image files by key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def listing(self) -> Listing:
        """As `Source.listing`."""
        with self._database.begin() as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
        return Listing(names=keys, labels=[0] * len(keys), classes=(self._path.name,))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        with self._database.begin() as transaction:
            found = transaction.get(name.encode("latin-1"))
        if found is None:
            raise ValueError("it is no longer there")
        return bytes(found)

    def holder(self, name: str) -> str:
        """As `Source.holder`: the database."""
        return "data.mdb"

    def stamp(self, holder: str) -> Stamp:
        """As `Source.stamp`."""
        return stamp_of(self._path / holder)

    @property
    def _database(self) -> Any:
        return _database(self._path)


@cache
def _database(path: Path) -> Any:
    """A database, opened once in a process: lmdb allows no more."""
    import lmdb  # optional: only this source needs it

    return lmdb.open(str(path), readonly=True, lock=False, readahead=False)


def _holds_images(directory: Path) -> bool:
    if litter(directory.name) or not directory.is_dir():
        return False
    return any(is_image(name) for name in os.listdir(directory))
