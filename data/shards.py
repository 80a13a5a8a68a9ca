"""Packed datasets on disk: opening them, verifying them, looking at them.

A dataset is a directory (or URL) of plain `.tar` files in WebDataset's conventions, so that any
WebDataset reader opens them. Beside each lies `NAME.idx.npy` with the place, label and checksum of
every image, and over all of them `manifest.json`, whose fingerprint names the dataset.

    python -m data.shards verify DIR [--full]      is it as the manifest says?
    python -m data.shards info DIR [--sheet PNG]   what is in it?
    python -m data.shards index DIR                make index and manifest for tars made by others
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from data import descriptors
from data.fetch import FetchConfig, Reader, is_local
from data.manifest import (
    MANIFEST,
    NO_CLASS,
    Shard,
    Shards,
    check_name,
    index_bytes,
    manifest_text,
    map_index,
    parse_manifest,
)
from data.sheet import contact_sheet
from data.tars import Index, index_tar

__all__ = ["Shards", "open_shards", "verify"]

_AT_ONCE = 32  # requests that only ask for sizes
_SHEET = 64  # thumbnails on a contact sheet


def open_shards(root: str | Path, *, fetch: FetchConfig | None = None) -> Shards:
    """Open a packed dataset and check that every shard and index is there in full.

    Where only a pipe leads to the files, their sizes show when they are read.

    Raises:
        ValueError: anything missing, of another size than the manifest says, or not a dataset.
    """
    reader = Reader(str(root), config=fetch or FetchConfig())
    shards = _read_manifest(reader)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for fault in threads.map(partial(_fault, shards, reader), shards.shards):
            if fault:
                raise ValueError(fault)
    return shards


def verify(root: str | Path, *, full: bool = False) -> list[str]:
    """Faults of a local dataset, one line each: presence and sizes, or with `full` checksums.

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
    for tar in tars:
        try:
            check_name(tar.stem)
        except ValueError as error:
            raise ValueError(f"{tar}: {error}; rename it") from None
    shards, labels = [], [0]
    kinds: dict[bool, Path] = {}
    for tar in tars:
        index, labelled = index_tar(tar)
        if labelled is not None:
            kinds.setdefault(labelled, tar)
        if len(kinds) == 2:
            raise ValueError(f"{kinds[False]} has no labels, and {kinds[True]} has some")
        labels.append(int(index["label"].max(initial=0)))
        content = index_bytes(index)
        tar.with_suffix(".idx.npy").write_bytes(content)
        shards.append(describe(tar, index, content))
    classes = tuple(str(i) for i in range(max(labels) + 1))
    if False in kinds:
        classes = (NO_CLASS,)
    made_by = {"index": "tars made by others"}
    text = manifest_text(tuple(shards), classes=classes, image_size=None, made_by=made_by)
    write_atomically(root / MANIFEST, text.encode())
    return open_shards(root)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there in full or not at all, also after a power cut."""
    aside = path.with_name(f"{path.name}.new")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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
    return parse_manifest(reader.root, content)


def _fault(shards: Shards, reader: Reader, shard: Shard) -> str | None:
    """What is wrong with a shard as far as sizes tell."""
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
            map_index(Path(shards.root), shard)
    except ValueError as error:
        return str(error)
    return None


def _checksum_fault(root: Path, shard: Shard) -> str | None:
    for name, sha256 in ((shard.tar, shard.sha256), (shard.index, shard.index_sha256)):
        if file_sha256(root / name) != sha256:
            return f"{root / name}: its checksum is not the manifest's"
    return None


def _describe_dataset(root: Path, sheet: Path | None) -> None:
    """Print what a dataset holds; draw thumbnails of some of its images."""
    shards = open_shards(root)
    counts = np.zeros(len(shards.classes), dtype=np.int64)
    for i in range(len(shards.shards)):  # a kept label would keep its index's file open
        counts += np.bincount(shards.index(i)["label"], minlength=len(counts))
    total = sum(shard.bytes for shard in shards.shards)
    size = f"{shards.image_size} x {shards.image_size}" if shards.image_size else "of own sizes"
    print(f"{shards.count} images {size}, {len(shards.shards)} shards, {total / 2**20:.1f} MiB")
    print(f"{len(counts)} classes with {counts.min()} to {counts.max()} images")
    for name, count in list(zip(shards.classes, counts, strict=True))[:20]:
        print(f"  {name or '(none)'}: {count}")
    if len(counts) > 20:
        print(f"  ... and {len(counts) - 20} more")
    print(f"fingerprint {shards.fingerprint}")
    if sheet:
        contact_sheet(_blobs(shards, _SHEET)).save(sheet)
        print(f"thumbnails: {sheet}")


def _blobs(shards: Shards, count: int) -> Iterator[bytes]:
    """Image files spread over the dataset."""
    reader = Reader(shards.root, config=FetchConfig())
    ends = np.cumsum(shards.sizes)
    for number in np.linspace(0, shards.count - 1, min(count, shards.count), dtype=int):
        shard = int(np.searchsorted(ends, number, side="right"))
        entry = shards.index(shard)[number - ends[shard]]
        yield reader.read(
            shards.shards[shard].tar, first=int(entry["offset"]), size=int(entry["size"])
        )
    reader.close()


def _verify_command(root: Path, full: bool) -> int:
    faults = verify(root, full=full)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{root}: all shards are as the manifest says")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python -m data.shards`."""
    parser = argparse.ArgumentParser(prog="python -m data.shards")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="check a dataset against its manifest")
    command.add_argument("dir", type=Path)
    command.add_argument("--full", action="store_true", help="checksums too, not only sizes")
    command = commands.add_parser("info", help="classes, counts, sizes")
    command.add_argument("dir", type=Path)
    command.add_argument("--sheet", type=Path, help="draw thumbnails into this PNG")
    command = commands.add_parser("index", help="index tars made by others")
    command.add_argument("dir", type=Path)
    options = parser.parse_args(arguments)
    descriptors.raise_limit()
    try:
        if options.command == "verify":
            return _verify_command(options.dir, options.full)
        if options.command == "index":
            index_directory(options.dir)
        _describe_dataset(options.dir, getattr(options, "sheet", None))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
