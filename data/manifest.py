"""What a packed dataset says about itself: the manifest over all shards, the index of each.

`manifest.json` names the shards with their sizes and checksums, the classes, and a fingerprint
over all of it, which names the dataset. `NAME.idx.npy` holds the place, label and checksum of
every image in NAME.tar.
"""

import hashlib
import io
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.tars import INDEX_DTYPE, Index

MANIFEST = "manifest.json"
FORMAT = "adm-shards-1"

# numpy reads an array's header with `ast`, which Python 3.11 cannot do in two threads at once.
_READING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

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

    def index(self, shard: int) -> Index:
        """The index of one local shard, mapped into memory that all processes share.

        Raises:
            OSError, ValueError: as `map_index`.
        """
        return map_index(Path(self.root), self.shards[shard])

    def parse_index(self, content: bytes) -> Index:
        """The index of one shard that came over a network, and has the manifest's checksum."""
        return _load_array(io.BytesIO(content))


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
        ValueError: it is damaged, altered, or something else.
    """
    where = f"{root}/{MANIFEST}"
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not the manifest of a packed dataset ({FORMAT})")
    fingerprint = manifest.pop("fingerprint", None)
    if fingerprint != _fingerprint(manifest):
        raise ValueError(f"{where} was altered: its fingerprint does not fit its content")
    return Shards(
        root=root,
        shards=tuple(Shard(**shard) for shard in manifest["shards"]),
        classes=tuple(manifest["classes"]),
        image_size=manifest["image_size"],
        fingerprint=fingerprint,
    )


def map_index(root: Path, shard: Shard) -> Index:
    """The index of a local shard, mapped into memory that all processes share.

    Raises:
        OSError: it is missing or unreadable.
        ValueError: it is damaged, or does not have the manifest's number of samples.
    """
    path = root / shard.index
    try:
        index = _load_array(path, mapped=shard.samples > 0)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise ValueError(
            f"{path} has {index.size} rows, the manifest says {shard.samples} samples: "
            "copy or pack it again"
        )
    return index


def rows_at(root: Path, shard: Shard) -> int:
    """The byte of a local shard's index file at which its rows begin.

    Raises:
        OSError, ValueError: as `map_index`.
    """
    index = map_index(root, shard)
    assert isinstance(index, np.memmap), "a shard without samples has no rows"
    return index.offset


def _load_array(source: Path | io.BytesIO, *, mapped: bool = False) -> Index:
    with _READING:
        index: Index = np.load(source, mmap_mode="r" if mapped else None, allow_pickle=False)
    return index


def _fingerprint(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
