"""What a packed dataset says about itself: the manifest over all shards, the index of each.

`manifest.json` names the shards with their sizes and checksums, the classes, and a fingerprint
over all of it, which names the dataset. `NAME.idx.npy` holds the place, label and checksum of
every image in NAME.tar.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.tars import HEADER, INDEX_DTYPE, Index

MANIFEST = "manifest.json"
FORMAT = "adm-shards-1"

#: What the class of images without a label is called.
NO_CLASS = ""

# A name becomes a file in a cache, a part of a URL and a word of a shell command.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 50

# numpy reads an array's header with `ast`, which Python 3.11 cannot do in two threads at once.
_READING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file as the manifest knows it.

    Raises:
        ValueError: a value of another type, or one that no shard can have.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    def __post_init__(self) -> None:
        check_name(self.name)
        for field in ("sha256", "index_sha256"):
            value = getattr(self, field)
            if not (isinstance(value, str) and _SHA256.fullmatch(value)):
                raise ValueError(f"{field} = {value!r:.80}: must be 64 hex digits")
        if not (type(self.bytes) is int and 0 <= self.bytes <= _MOST_BYTES):
            raise ValueError(f"bytes = {self.bytes!r:.80}: must be from 0 to {_MOST_BYTES}")
        most = self.bytes // HEADER
        if not (type(self.samples) is int and 0 <= self.samples <= most):
            raise ValueError(
                f"samples = {self.samples!r:.80}: must be from 0 to {most}, which is what a tar of "
                f"{self.bytes} bytes has room for"
            )

    @property
    def tar(self) -> str:
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        return f"{self.name}.idx.npy"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A packed dataset. `image_size` is None where the images keep their own sizes."""

    root: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    image_size: int | None
    fingerprint: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def count(self) -> int:
        """Images in all."""
        return sum(self.sizes)

    @property
    def labelled(self) -> bool:
        """Whether each image has a label."""
        return NO_CLASS not in self.classes

    def index(self, shard: int) -> Index:
        """The index of one local shard, mapped into memory that all processes share.

        Raises:
            OSError, ValueError: as `map_index`.
        """
        return map_index(Path(self.root), self.shards[shard])

    def parse_index(self, shard: int, content: bytes) -> Index:
        """The index of one shard that came over a network, and has the manifest's checksum.

        Raises:
            ValueError: as `map_index`.
        """
        where = f"{self.root}/{self.shards[shard].index}"
        return _check_index(_read_array(io.BytesIO(content), where), self.shards[shard], where)


def check_name(name: object) -> None:
    """Return if a shard may have this name.

    Raises:
        ValueError: it may not.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"name = {name!r:.80}: must be letters, digits, '_', '-' and '.', and begin with a "
            "letter, a digit or '_'"
        )


def index_bytes(index: Index) -> bytes:
    """The content of an index file."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()


def manifest_text(
    shards: tuple[Shard, ...],
    *,
    classes: tuple[str, ...],
    image_size: int | None,
    made_by: Mapping[str, Any],
) -> str:
    """The manifest as JSON, fingerprint included. `made_by` records how the tars were made."""
    body = {
        "format": FORMAT,
        "image_size": image_size,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
        "made_by": made_by,
    }
    return json.dumps({**body, "fingerprint": _fingerprint(body)}, indent=1) + "\n"


def parse_manifest(root: str, content: bytes) -> Shards:
    """Read a manifest back.

    Raises:
        ValueError: it is damaged, altered, or something else; the message names file and entry.
    """
    where = f"{root}/{MANIFEST}"
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not the manifest of a packed dataset ({FORMAT})")
    fingerprint = manifest.pop("fingerprint", None)
    if fingerprint != _fingerprint(manifest):
        raise ValueError(f"{where} was altered: its fingerprint does not fit its content")
    try:
        return Shards(
            root=root,
            shards=_parse_shards(manifest.get("shards")),
            classes=_parse_classes(manifest.get("classes")),
            image_size=_parse_image_size(manifest.get("image_size")),
            fingerprint=fingerprint,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parse_shards(entries: object) -> tuple[Shard, ...]:
    if not isinstance(entries, list):
        raise ValueError(f"shards = {entries!r:.80}: must be a list")
    shards: dict[str, Shard] = {}
    for i, entry in enumerate(entries):
        try:
            shard = _parse_shard(entry)
        except ValueError as error:
            raise ValueError(f"shards[{i}]: {error}") from None
        if shard.name in shards:
            raise ValueError(f"shards[{i}]: name = {shard.name!r}: an earlier shard has this name")
        shards[shard.name] = shard
    return tuple(shards.values())


def _parse_shard(entry: object) -> Shard:
    wanted = {field.name for field in fields(Shard)}
    if not (isinstance(entry, dict) and entry.keys() == wanted):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{found!r:.80}: must have the keys {', '.join(sorted(wanted))}")
    try:
        check_name(entry["name"])
    except ValueError as error:
        raise ValueError(
            f"{error}; if the dataset is yours, rename the .tar files, delete {MANIFEST} and run "
            "`python -m data.shards index`"
        ) from None
    return Shard(**entry)


def _parse_classes(names: object) -> tuple[str, ...]:
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"classes = {names!r:.80}: must be a list of one or more names")
    return tuple(names)


def _parse_image_size(size: object) -> int | None:
    if size is not None and not (type(size) is int and size >= 1):
        raise ValueError(f"image_size = {size!r:.80}: must be at least 1, or null")
    return size


def map_index(root: Path, shard: Shard) -> Index:
    """The index of a local shard, mapped into memory that all processes share.

    Raises:
        OSError: it is missing or unreadable.
        ValueError: it is damaged, or does not have the manifest's number of samples.
    """
    path = root / shard.index
    if not shard.samples:  # nothing cannot be mapped
        return _check_index(_read_array(io.BytesIO(path.read_bytes()), path), shard, path)
    try:
        with _READING:
            index: Index = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return _check_index(index, shard, path)


def rows_at(root: Path, shard: Shard) -> int:
    """The byte of a local shard's index file at which its rows begin.

    Raises:
        OSError, ValueError: as `map_index`.
    """
    index = map_index(root, shard)
    assert isinstance(index, np.memmap), "a shard without samples has no rows"
    return index.offset


def _read_array(file: BinaryIO, where: Path | str) -> Index:
    try:
        with _READING:
            index: Index = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    return index


def _check_index(index: Index, shard: Shard, where: Path | str) -> Index:
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        kind = "" if index.dtype == INDEX_DTYPE else " of another kind"
        raise ValueError(
            f"{where} has {index.size} rows{kind}, the manifest says {shard.samples} samples: "
            "copy or pack it again"
        )
    return index


def _fingerprint(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
