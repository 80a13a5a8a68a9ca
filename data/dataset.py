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

import numpy as np

from data import files, npz
from data.config import FetchConfig, expanded, is_local, shown
from data.index import Index, parse_index
from data.manifest import MANIFEST, NO_CLASS, Manifest, Shard, parse_manifest
from data.reader import Reader
from data.stores import FINAL
from data.tars import HEADER, read_header

# Shards that are checked at once; each asks for two sizes and reads at most one index and header.
_REQUESTS = 32


@dataclass(frozen=True, kw_only=True)
class Shards(Manifest):
    """A packed dataset: what its manifest says, and the directory or URL that contains it."""

    root: str

    @property
    def parts(self) -> "tuple[Shards, ...]":
        """The datasets of a mixture: here, this one."""
        return (self,)

    @property
    def shares(self) -> "tuple[tuple[Shards, float], ...]":
        """As `data.mixture.Mixture.shares`."""
        return ((self, 1.0),)

    @property
    def where(self) -> str:
        """The root as messages show it."""
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
        """The index of one local shard; only its number of rows is checked."""
        entry = self.shards[shard]
        path = Path(self.root, entry.index)
        return parse_index(path.read_bytes(), samples=entry.samples, where=path)

    def read_index(self, shard: int, reader: Reader) -> Index:
        """The index of one shard, checked as `Reader.whole` and `parse_index` do."""
        entry = self.shards[shard]
        content = reader.whole(entry.index, sha256=entry.index_sha256)
        return self.parse_index(shard, content, reader=reader)

    def parse_index(self, shard: int, content: bytes, *, reader: Reader) -> Index:
        """As `data.index.parse_index`, of one shard; `reader` reads the key for a message.

        Raises:
            ValueError: also where an image has a label that is no class of the manifest.
        """
        entry = self.shards[shard]
        where = f"{self.where}/{entry.index}"
        index = parse_index(content, samples=entry.samples, where=where)
        labels, count = index["label"], len(self.classes)
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            row = int(wrong[0])
            key = self.key(shard, row, first=int(index[row]["offset"]) - HEADER, reader=reader)
            raise ValueError(
                f"{self.where}/{entry.tar}: {key} has the label {labels[row]}, and {MANIFEST} "
                f"names {count} classes: pack it again, or with --class-map"
            )
        return index

    def key(self, shard: int, row: int, *, first: int, reader: Reader) -> str:
        """An image's key for a message, or its row where that cannot be read.

        It is read from the header at byte `first`, or from that of its label just before.
        """
        for at in (first, first - 2 * HEADER):
            with suppress(OSError, ValueError):
                raw = reader.glimpse(self.shards[shard].tar, first=at, size=HEADER)
                return read_header(raw)[0].partition(".")[0]
        return f"image {row}"


def open_shards(
    root: str | Path,
    *,
    fetch: FetchConfig | None = None,
    check_files: bool = True,
    named: str = "data.shards",
) -> Shards:
    """Open a packed dataset; check that each shard is there, of the right size, with its index.

    `~` and `$VARIABLES` in a path are replaced. Indexes in a directory are checked now, and each
    tar's last header; indexes behind a URL when they are first used; the sizes of files behind a
    `pipe:` are unknown until they are read. With `check_files` False, only the manifest is read:
    one process of a node is enough to check the rest. `named` is the setting that has the path.

    Raises:
        ValueError: there is no dataset, or a file is missing or not what the manifest says, or a
            label is no class.
        OSError: its server does not answer.
    """
    reader = Reader(expanded(str(root), name=named), config=fetch or FetchConfig())
    shards = _read_manifest(reader)
    if check_files and (fault := next(_faults(shards, reader), None)):
        raise ValueError(fault)
    return shards


def class_names(root: str | Path) -> tuple[str, ...]:
    """The names of a dataset's classes, by number, from its manifest; ValueError without one."""
    path = expanded(str(root), name="data.shards")
    try:
        return _read_manifest(Reader(path, config=FetchConfig(retries=0))).classes
    except OSError as error:
        raise ValueError(str(error)) from None


def unlisted(shards: Shards) -> str:
    """A line about the tars of a directory that its manifest does not list; "" without such."""
    if not is_local(shards.root):
        return ""
    known, others = {shard.tar for shard in shards.shards}, list[str]()
    with suppress(OSError), os.scandir(shards.root) as entries:
        names = (entry.name for entry in entries if entry.name.endswith(".tar"))
        others = sorted(name for name in names if name not in known and name[0] != ".")
    if not others:
        return ""
    count = f"{len(others)} tars are" if len(others) > 1 else "1 tar is"
    return (
        f"{shards.where}: {count} not in {MANIFEST} and not read, such as {others[0]}; to use "
        "them, move them to another directory, `python -m data.pack` it, and join both datasets by "
        "`python -m data.shards merge`"
    )


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
        for number, shard in enumerate(shards.shards):
            if _sha256_of(reader, shard) != shard.sha256:
                faults.append(f"{shards.where}/{shard.tar}: its checksum is not the manifest's")
            if fault := _index_fault(shards, reader, number):
                faults.append(fault)
    return faults


def write_index(tar: Path, index: Index, *, writer: str = "partial") -> Shard:
    """Write the index of a finished tar beside it, and return the manifest's entry of both.

    `writer` is as in `data.files.whole`.
    """
    content = npz.npy(index)
    files.write(tar.with_suffix(".idx.npy"), content, writer=writer)
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
        if is_local(reader.root):
            files.check_link(Path(reader.root))
        raise ValueError(
            f"no dataset at {reader.name}: {MANIFEST} is missing; make one with "
            "`python -m data.pack`"
        ) from None
    except OSError as error:
        # A server that does not answer now is no user error: the same command may succeed later.
        kind = ValueError if isinstance(error, FINAL) else OSError
        raise kind(f"{reader.name}/{MANIFEST} cannot be read: {files.reason(error)}") from None
    manifest = parse_manifest(f"{reader.name}/{MANIFEST}", content)
    return Shards(root=reader.root, **vars(manifest))


def _faults(shards: Shards, reader: Reader) -> Iterator[str]:
    """The faults of the shards' files that show without reading a tar."""
    size_of = _sizes_in(shards.root).__getitem__ if is_local(shards.root) else reader.size
    with ThreadPoolExecutor(_REQUESTS) as threads:
        look = partial(_fault, shards, reader, size_of)
        yield from filter(None, threads.map(look, range(len(shards.shards))))


def _sizes_in(root: str) -> dict[str, int]:
    """The sizes of all files of a directory, listed once."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            with suppress(OSError):  # a link to nothing or a directory counts as missing
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
    return found


def _fault(
    shards: Shards, reader: Reader, size_of: Callable[[str], int | None], number: int
) -> str | None:
    """The fault of a shard's files: of their sizes or, in a directory, of the index."""
    shard = shards.shards[number]
    for name in (shard.tar, shard.index):
        try:
            size = size_of(name)
        except (KeyError, FileNotFoundError):
            link = files.link_fault(Path(shards.root, name)) if is_local(shards.root) else ""
            missing = link or f"{shards.where}/{name} is missing"
            return f"{missing}: the manifest lists it; copy or pack it again"
        except FINAL as error:
            return str(error)
        if name == shard.tar and size not in (None, shard.bytes):
            return (
                f"{shards.where}/{name} has {size} bytes, the manifest says {shard.bytes}: "
                "it was truncated or replaced; copy or pack it again"
            )
    if not is_local(shards.root):
        return None
    tar = Path(shards.root) / shard.tar
    readable = os.access(tar, os.R_OK, effective_ids=True)
    return _index_fault(shards, reader, number) if readable else files.denial(tar)


def _index_fault(shards: Shards, reader: Reader, number: int) -> str | None:
    """The fault of the content of a shard's index, or in a directory of the tar's end."""
    shard = shards.shards[number]
    try:
        if is_local(shards.root):  # the reader would keep the file open
            content = Path(shards.root, shard.index).read_bytes()
        else:
            content = reader.whole(shard.index)
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            return (
                f"{shards.where}/{shard.index} is damaged or of another packing: its checksum is "
                "not the manifest's; copy or pack it again"
            )
        index = shards.parse_index(number, content, reader=reader)
        return _end_fault(shards, reader, shard, index) if is_local(shards.root) else None
    except (ValueError, OSError) as error:
        return files.reason(error)


def _end_fault(shards: Shards, reader: Reader, shard: Shard, index: Index) -> str | None:
    """The fault of a tar that has not the last image of its index, found before training does."""
    if not len(index):
        return None
    first, size = int(index[-1]["offset"]) - HEADER, index[-1]["size"]
    with suppress(ValueError):
        if read_header(reader.read(shard.tar, first=first, size=HEADER))[1] == size:
            return None
    return (
        f"{shards.where}/{shard.tar} has no header of the last image of {shard.index} at byte "
        f"{first}: it was copied in part, or is another shard; copy or pack it again"
    )


def _sha256_of(reader: Reader, shard: Shard) -> str:
    """The checksum of as many bytes of a tar as the manifest says."""
    digest = hashlib.sha256()
    for piece in reader.pieces(shard.tar, first=0, last=shard.bytes):
        digest.update(piece)
    return digest.hexdigest()
