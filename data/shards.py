"""The shard format: what lies on disk between packing and streaming.

A dataset is a directory of plain `.tar` files in WebDataset's conventions (`KEY.cls` beside
`KEY.png` or `KEY.jpg`), so that any WebDataset reader opens them. Beside each lies `NAME.idx.npy`
with the place, label and checksum of every image, and over all of them `manifest.json`, whose
fingerprint names the dataset.

    python -m data.shards verify DIR [--full]
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
FORMAT = "adm-shards-1"
HEADER = 512  # bytes of a tar header, which stands right before its payload

INDEX_DTYPE = np.dtype(
    [("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")]
)  # of the image's payload
Index = NDArray[np.void]


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
        """The index of one shard, mapped into memory that all processes of a machine share.

        Raises:
            ValueError: it is missing, or does not have the manifest's number of samples.
        """
        return _read_index(Path(self.root), self.shards[shard])


class ShardWriter:
    """Writes one tar, byte for byte as webdataset's TarWriter does with `mtime=0`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = 0
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, key: str, *, image: bytes, suffix: str, label: int) -> None:
        """Append one sample."""
        self._member(f"{key}.cls", str(label).encode())
        offset = self._member(f"{key}.{suffix}", image)
        self._rows.append((offset, len(image), label, zlib.crc32(image)))

    def close(self) -> Index:
        """End the tar and return its index."""
        end = self._end + 2 * HEADER
        self._write(b"\0" * (-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self._end))
        return np.array(self._rows, dtype=INDEX_DTYPE)

    def _member(self, name: str, payload: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(payload), 0o444
        info.uname = info.gname = "bigdata"
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._end
        self._write(payload + b"\0" * (-len(payload) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._end += len(content)


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
    """The manifest as JSON, fingerprint included. `made_by` records the packer's options."""
    body = {
        "format": FORMAT,
        "image_size": image_size,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
        "made_by": made_by,
    }
    return json.dumps({**body, "fingerprint": _fingerprint(body)}, indent=1) + "\n"


def open_shards(path: str | Path) -> Shards:
    """Open a packed dataset and check that every shard and index is there in full.

    Raises:
        ValueError: anything missing, of another size than the manifest says, or not a dataset.
    """
    root = Path(path)
    shards = _parse(str(root), _read_manifest(root))
    for shard in shards.shards:
        size = _size(root / shard.tar)
        if size != shard.bytes:
            raise ValueError(
                f"{root / shard.tar} has {size} bytes, the manifest says {shard.bytes}: "
                "it was truncated or replaced; copy or pack it again"
            )
        _read_index(root, shard)
    return shards


def verify(path: str | Path, *, full: bool = False) -> list[str]:
    """Faults of a dataset, one line each: presence and sizes, or with `full` every checksum.

    Raises:
        ValueError: there is no readable manifest to verify against.
    """
    root = Path(path)
    faults = []
    for shard in _parse(str(root), _read_manifest(root)).shards:
        try:
            if _size(root / shard.tar) != shard.bytes:
                raise ValueError(f"{root / shard.tar}: size differs from the manifest")
            _read_index(root, shard)
            for name, sha256 in ((shard.tar, shard.sha256), (shard.index, shard.index_sha256)):
                if full and file_sha256(root / name) != sha256:
                    raise ValueError(f"{root / name}: checksum differs from the manifest")
        except ValueError as error:
            faults.append(str(error))
    return faults


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"no dataset at {root}: {MANIFEST} is missing; make one with `python -m data.pack`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{root / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{root / MANIFEST} is not the manifest of a packed dataset ({FORMAT})")
    return manifest


def _parse(root: str, manifest: dict[str, Any]) -> Shards:
    fingerprint = manifest.pop("fingerprint", None)
    if fingerprint != _fingerprint(manifest):
        raise ValueError(f"{root}/{MANIFEST} was altered: its fingerprint does not fit its content")
    return Shards(
        root=root,
        shards=tuple(Shard(**shard) for shard in manifest["shards"]),
        classes=tuple(manifest["classes"]),
        image_size=manifest["image_size"],
        fingerprint=fingerprint,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: the manifest lists it; copy or pack it again"
        ) from None


def _read_index(root: Path, shard: Shard) -> Index:
    path = root / shard.index
    _size(path)
    try:
        index = np.load(path, mmap_mode="r" if shard.samples else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise ValueError(
            f"{path} has {index.size} rows, the manifest says {shard.samples} samples: "
            "copy or pack it again"
        )
    return index


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python -m data.shards`."""
    parser = argparse.ArgumentParser(prog="python -m data.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="check a dataset against its manifest")
    command.add_argument("dir", type=Path)
    command.add_argument("--full", action="store_true", help="checksums too, not only sizes")
    options = parser.parse_args(arguments)
    try:
        faults = verify(options.dir, full=options.full)
    except ValueError as error:
        faults = [str(error)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{options.dir}: all shards are as the manifest says")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
