"""A packed dataset: opening it, verifying it, and making one of tars that exist already.

A dataset is a directory (or URL) of plain `.tar` files in WebDataset's conventions, so that any
WebDataset reader opens them. Each has an index beside it (`data.index`), and one manifest lists
all of them (`data.manifest`).
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import files
from data.config import FetchConfig
from data.index import index_bytes, map_index, parse_index, rows_at
from data.manifest import (
    MANIFEST,
    NO_CLASS,
    Manifest,
    Shard,
    check_name,
    manifest_text,
    parse_manifest,
)
from data.reader import Reader
from data.splits import splits_among
from data.stores import is_local
from data.tars import Index, index_tar

# Requests at the same time; each only asks for a size.
_SIZE_REQUESTS = 32


@dataclass(frozen=True, kw_only=True)
class Shards(Manifest):
    """A packed dataset: what its manifest says, and the directory or URL that contains it."""

    root: str

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
        """The index (samples,) of one local shard, mapped into memory that all processes share.

        Raises:
            OSError, ValueError: as `data.index.map_index`.
        """
        entry = self.shards[shard]
        return map_index(Path(self.root, entry.index), samples=entry.samples)

    def rows_at(self, shard: int) -> int:
        """The byte at which the rows of one local shard's index begin.

        Raises:
            OSError, ValueError: as `data.index.map_index`.
        """
        entry = self.shards[shard]
        return rows_at(Path(self.root, entry.index), samples=entry.samples)

    def parse_index(self, shard: int, content: bytes) -> Index:
        """The index (samples,) of one shard from the content of its index file.

        Raises:
            ValueError: as `data.index.map_index`.
        """
        entry = self.shards[shard]
        where = f"{self.root}/{entry.index}"
        return parse_index(content, samples=entry.samples, where=where)


def open_shards(root: str | Path, *, fetch: FetchConfig | None = None) -> Shards:
    """Open a packed dataset and check that every shard and index is there, of the right size.

    The sizes of files behind a `pipe:` are unknown until they are read.

    Raises:
        ValueError: there is no dataset, or a file is missing or of another size than the manifest
            says.
    """
    reader = Reader(str(root), config=fetch or FetchConfig())
    shards = _read_manifest(reader)
    with ThreadPoolExecutor(_SIZE_REQUESTS) as threads:
        for fault in threads.map(partial(_fault, shards, reader), shards.shards):
            if fault:
                raise ValueError(fault)
    return shards


def class_names(root: str | Path) -> tuple[str, ...]:
    """The names of a dataset's classes, by their numbers, from the manifest alone.

    Raises:
        ValueError: there is no readable manifest.
    """
    return _read_manifest(Reader(str(root), config=FetchConfig(retries=0))).classes


def verify(root: str | Path, *, full: bool = False) -> list[str]:
    """Faults of a local dataset, one line each: files and sizes, with `full` also checksums.

    Raises:
        ValueError: there is no readable manifest to verify against.
    """
    reader = Reader(str(root), config=FetchConfig(retries=0))
    shards = _read_manifest(reader)
    faults = []
    for shard in shards.shards:
        fault = _fault(shards, reader, shard)
        if full and not fault:
            fault = _checksum_fault(Path(root), shard)
        if fault:
            faults.append(fault)
    return faults


def index_directory(root: Path) -> Shards:
    """Make index and manifest for the tars in a directory; labels become classes "0" to "max".

    Without labels there is one class, which has no name.

    Raises:
        ValueError: there is a manifest already, there are no tars, one is damaged, its name is not
            one that a shard may have, or some have labels and others none.
    """
    tars = sorted(root.glob("*.tar"))
    if (root / MANIFEST).exists() or not tars:
        what = "has a manifest already" if tars else "holds no .tar files"
        raise ValueError(f"{root} {what}: there is nothing to index")
    if found := splits_among(tar.name for tar in tars):
        raise ValueError(
            f"{root} holds the splits {', '.join(found)}: move each to a directory of its own"
        )
    for tar in tars:
        try:
            check_name(tar.stem)
        except ValueError as error:
            raise ValueError(f"{tar}: {error}; rename it") from None
    shards, classes = _index_tars(tars)
    made_by = {"index": "tars made by others"}
    text = manifest_text(shards, classes=classes, image_size=None, made_by=made_by)
    files.write(root / MANIFEST, text)
    return open_shards(root)


def _index_tars(tars: list[Path]) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """Write the index of each tar; what the manifest lists for shards and classes."""
    shards, labels = [], [0]
    # The first tar with labels and the first without.
    kinds: dict[bool, Path] = {}
    for tar in tars:
        index, labelled = index_tar(tar)
        if labelled is not None:
            kinds.setdefault(labelled, tar)
        if len(kinds) == 2:
            raise ValueError(f"{kinds[False]} has no labels, and {kinds[True]} has some")
        labels.append(int(index["label"].max(initial=0)))
        content = index_bytes(index)
        files.write(tar.with_suffix(".idx.npy"), content)
        shards.append(describe(tar, index, content))
    if False in kinds:
        return tuple(shards), (NO_CLASS,)
    return tuple(shards), tuple(str(i) for i in range(max(labels) + 1))


def describe(tar: Path, index: Index, content: bytes) -> Shard:
    """A finished shard's entry in the manifest, from its file, index and index file's content."""
    return Shard(
        name=tar.stem,
        samples=len(index),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(reader: Reader) -> Shards:
    try:
        content = reader.whole(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"no dataset at {reader.root}: {MANIFEST} is missing; make one with "
            "`python -m data.pack`"
        ) from None
    except OSError as error:
        raise ValueError(f"{reader.root}/{MANIFEST} cannot be read: {error}") from None
    manifest = parse_manifest(f"{reader.root}/{MANIFEST}", content)
    return Shards(root=reader.root, **vars(manifest))


def _fault(shards: Shards, reader: Reader, shard: Shard) -> str | None:
    """What is wrong with a shard's files without reading the tar."""
    for name in (shard.tar, shard.index):
        try:
            size = reader.size(name)
        except FileNotFoundError:
            missing = f"{shards.root}/{name} is missing"
            return f"{missing}: the manifest lists it; copy or pack it again"
        except OSError as error:
            return str(error)
        if name == shard.tar and size not in (None, shard.bytes):
            return (
                f"{shards.root}/{name} has {size} bytes, the manifest says {shard.bytes}: "
                "it was truncated or replaced; copy or pack it again"
            )
    try:
        if is_local(shards.root):
            map_index(Path(shards.root, shard.index), samples=shard.samples)
    except ValueError as error:
        return str(error)
    return None


def _checksum_fault(root: Path, shard: Shard) -> str | None:
    for name, sha256 in ((shard.tar, shard.sha256), (shard.index, shard.index_sha256)):
        if file_sha256(root / name) != sha256:
            return f"{root / name}: its checksum is not the manifest's"
    return None
