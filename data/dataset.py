"""A packed dataset: opening it and verifying it.

A dataset is a directory (or URL) of plain `.tar` files in WebDataset's conventions, so that any
WebDataset reader opens them. Each has an index beside it (`data.index`), and one manifest lists
all of them (`data.manifest`).
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import files
from data.config import FetchConfig, expanded, is_local, shown
from data.index import has_size_of, map_index, parse_index, rows_at
from data.manifest import (
    MANIFEST,
    NO_CLASS,
    Manifest,
    Shard,
    parse_manifest,
)
from data.reader import END, Reader
from data.tars import Index

# Requests at the same time; each only asks for a size.
_SIZE_REQUESTS = 32


@dataclass(frozen=True, kw_only=True)
class Shards(Manifest):
    """A packed dataset: what its manifest says, and the directory or URL that contains it."""

    root: str

    @property
    def parts(self) -> "tuple[Shards, ...]":
        """This dataset, as the only one of a mixture."""
        return (self,)

    @property
    def shares(self) -> "tuple[tuple[Shards, float], ...]":
        """As `data.mixture.Mixture.shares`."""
        return ((self, 1.0),)

    @property
    def where(self) -> str:
        """The root as messages have it."""
        return shown(self.root)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(self.sizes)

    @property
    def labelled(self) -> bool:
        """Whether each image has a label."""
        return NO_CLASS not in self.classes

    def index(self, shard: int) -> Index:
        """As `data.index.map_index`, of one local shard."""
        entry = self.shards[shard]
        return map_index(Path(self.root, entry.index), samples=entry.samples)

    def rows_at(self, shard: int) -> int:
        """As `data.index.rows_at`, of one local shard."""
        entry = self.shards[shard]
        return rows_at(Path(self.root, entry.index), samples=entry.samples)

    def parse_index(self, shard: int, content: bytes) -> Index:
        """As `data.index.parse_index`, of one shard."""
        entry = self.shards[shard]
        where = f"{self.where}/{entry.index}"
        return parse_index(content, samples=entry.samples, where=where)


def open_shards(
    root: str | Path,
    *,
    fetch: FetchConfig | None = None,
    check_files: bool = True,
    named: str = "data.shards",
) -> Shards:
    """Open a packed dataset and check that every shard and index is there, of the right size.

    `~` and `$VARIABLES` in a path have the values of this machine. The sizes of files behind a
    `pipe:` are unknown until they are read. With `check_files` False, only the manifest is read:
    one process of a node is enough to check the rest. `named` is the setting that has the path.

    Raises:
        ValueError: there is no dataset, or a file is missing or of another size than the manifest
            says.
    """
    reader = Reader(expanded(str(root), name=named), config=fetch or FetchConfig())
    shards = _read_manifest(reader)
    fault = next(_faults(shards, reader), None) if check_files else None
    if fault:
        raise ValueError(fault)
    return shards


def class_names(root: str | Path) -> tuple[str, ...]:
    """The names of a dataset's classes, by number, from its manifest; ValueError without one."""
    path = expanded(str(root), name="data.shards")
    return _read_manifest(Reader(path, config=FetchConfig(retries=0))).classes


def verify(root: str | Path, *, full: bool = False) -> list[str]:
    """Faults of a dataset, one line each: files and sizes, with `full` also checksums.

    Raises:
        ValueError: there is no readable manifest to verify against.
    """
    root = expanded(str(root), name="DIR")
    reader = Reader(root, config=FetchConfig(retries=0 if is_local(root) else 2))
    shards = _read_manifest(reader)
    faults = list(_faults(shards, reader))
    if full and not faults:
        for shard in shards.shards:
            for name, sha256 in ((shard.tar, shard.sha256), (shard.index, shard.index_sha256)):
                if _sha256_of(reader, name) != sha256:
                    faults.append(f"{shards.where}/{name}: its checksum is not the manifest's")
    return faults


def describe(tar: Path, index: Index, content: bytes) -> Shard:
    """A finished shard's entry in the manifest, from its file, index and index file's content."""
    return Shard(
        name=tar.stem,
        samples=len(index),
        bytes=tar.stat().st_size,
        sha256=files.sha256(tar),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )


def _read_manifest(reader: Reader) -> Shards:
    try:
        content = reader.whole(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"no dataset at {reader.name}: {MANIFEST} is missing; make one with "
            "`python -m data.pack`"
        ) from None
    except OSError as error:
        raise ValueError(f"{reader.name}/{MANIFEST} cannot be read: {error}") from None
    manifest = parse_manifest(f"{reader.name}/{MANIFEST}", content)
    return Shards(root=reader.root, **vars(manifest))


def _faults(shards: Shards, reader: Reader) -> Iterator[str]:
    """What is wrong with the shards' files, without reading a tar."""
    size_of: Callable[[str], int | None] = reader.size
    if is_local(shards.root):
        size_of = _sizes_in(shards.root).__getitem__
    names = [name for shard in shards.shards for name in (shard.tar, shard.index)]
    with ThreadPoolExecutor(_SIZE_REQUESTS) as threads:
        sizes = threads.map(partial(_size_or_fault, shards, size_of), names)
        for number in range(len(shards.shards)):
            fault = _fault(shards, number, tar=next(sizes), index=next(sizes))
            if fault:
                yield fault


def _sizes_in(root: str) -> dict[str, int]:
    """The sizes of all files of a directory, listed once."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            with suppress(OSError):  # a link to nothing, say: it counts as missing
                found[entry.name] = entry.stat().st_size
    return found


def _size_or_fault(
    shards: Shards, size_of: Callable[[str], int | None], name: str
) -> int | str | None:
    """Bytes of a file, None where that is unknown, or why it cannot be used."""
    try:
        return size_of(name)
    except (KeyError, FileNotFoundError):
        return f"{shards.where}/{name} is missing: the manifest lists it; copy or pack it again"
    except OSError as error:
        return str(error)


def _fault(
    shards: Shards, number: int, *, tar: int | str | None, index: int | str | None
) -> str | None:
    """What is wrong with the sizes of a shard's files."""
    shard = shards.shards[number]
    for found in (tar, index):
        if isinstance(found, str):
            return found
    if tar not in (None, shard.bytes):
        return (
            f"{shards.where}/{shard.tar} has {tar} bytes, the manifest says {shard.bytes}: "
            "it was truncated or replaced; copy or pack it again"
        )
    if is_local(shards.root) and not has_size_of(index, samples=shard.samples):
        try:
            shards.index(number)
        except ValueError as error:
            return str(error)
    return None


def _sha256_of(reader: Reader, name: str) -> str:
    digest = hashlib.sha256()
    size = reader.size(name)
    for piece in reader.pieces(name, first=0, last=size if size is not None else END):
        digest.update(piece)
    return digest.hexdigest()
