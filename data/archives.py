"""Sources that are datasets already: WebDataset tars, Hugging Face parquet, LSUN's lmdb.

Packing reads images in shuffled order. Tars and lmdb allow that; parquet, which compresses images
in groups, is unpacked once, into a directory of the packing.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data import files
from data.labels import LABEL_KEYS, Label, label_of
from data.layout import class_directories
from data.listing import Listing, by_directory_name, by_label_if_any
from data.manifest import NO_CLASS
from data.names import is_image, litter
from data.sources import Digits, Folder, Source, Zip
from data.splits import check_files
from data.tars import scan_tar


def open_source(text: str, *, staging: Path) -> Source:
    """The source at a path of the command line; parquet is unpacked into `staging`.

    Raises:
        ValueError: there is nothing of the known kinds, or files of several splits, or not all.
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
            check_files(found, pattern=path.name if path.suffix == suffix else "*")
            return kind(found, staging=staging)
    if path.is_dir():
        return Folder(path)
    raise ValueError(
        f"SOURCE = {text}: must be a folder, zip, tar, parquet or lmdb of images, or `digits`"
    )


# Directories that are named after their shard, which says nothing of classes.
_SHARD = re.compile(r"(.*(shard|part|chunk).*)?[\d_-]+", re.IGNORECASE)


class Tars:
    """Existing WebDataset shards, or tars of class directories.

    Labels are in `.cls`, `.json` or `.txt`, or else the directories, if there are any.
    """

    def __init__(self, files: list[Path], *, staging: Path) -> None:
        self._files = {file.name: file for file in files}

    def listing(self) -> Listing:
        """As `Source.listing`."""
        names: list[str] = []
        labels: list[Label | None] = []
        members: list[str] = []
        skipped = Counter[str]()
        for file in self._files.values():
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
        where = str(next(iter(self._files.values())).parent)
        classes, fault = class_directories(members, directories=(), where=where)
        found = {*classes}
        stems = {name.removesuffix(".tar") for name in self._files}
        are_shards = found <= stems and all(_SHARD.fullmatch(name) for name in found)
        if len(found) < 2 or NO_CLASS in found or are_shards:
            return listing
        return replace(by_directory_name(listing.names, classes), fault=fault)

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, extent = name.partition("/")[0].rpartition("@")
        return _read_extent(self._files[file], extent)


class Parquet:
    """Hugging Face image datasets: a column of image files, and perhaps one of class labels."""

    def __init__(self, files: list[Path], *, staging: Path) -> None:
        self._files, self._staging = files, staging

    def listing(self) -> Listing:
        """As `Source.listing`."""
        names: list[str] = []
        labels: list[Label | None] = []
        for file in self._files:
            for extent, label in self._unpacked(file):
                names.append(f"{file.name}@{extent}")
                labels.append(label)
        listing = by_label_if_any(names, labels)
        are_numbers = all(isinstance(label, int) for label in labels)
        classes = _class_names(self._files[0]) if are_numbers else None
        return replace(listing, classes=classes or listing.classes)

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, extent = name.rpartition("@")
        return _read_extent(self._staging / f"{file}.blob", extent)

    def _unpacked(self, file: Path) -> list[tuple[str, Label | None]]:
        """Extent and label of each image; they are unpacked into one file, if they are not yet."""
        done = self._staging / f"{file.name}.extents"
        if not done.exists():
            extents = []
            with files.whole(self._staging / f"{file.name}.blob") as blob:
                for image, label in _rows(file):
                    extents.append((f"{blob.tell()}+{len(image)}", label))
                    blob.write(image)
            files.write(done, json.dumps(extents))
        return [(extent, label) for extent, label in json.loads(done.read_text())]


class Lmdb:
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
            return bytes(transaction.get(name.encode("latin-1")))

    @cached_property
    def _database(self) -> Any:
        import lmdb  # optional: only this source needs it

        return lmdb.open(str(self._path), readonly=True, lock=False, readahead=False)


def _holds_images(directory: Path) -> bool:
    if litter(directory.name) or not directory.is_dir():
        return False
    return any(is_image(name) for name in os.listdir(directory))


def _read_extent(path: Path, extent: str) -> bytes:
    offset, size = map(int, extent.split("+"))
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _rows(file: Path) -> Iterator[tuple[bytes, Label | None]]:
    """Image file and label of each row: b"" where there is no image, -1 where a label is missing.

    The label is None where the file has no column of labels.
    """
    from pyarrow import parquet, types  # optional: only this source needs it

    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    image = next((f.name for f in schema if types.is_struct(f.type) or _is_bytes(f.type)), None)
    if image is None:
        raise ValueError(f"{file} has no column of images among {schema.names}")
    label = next((key for key in LABEL_KEYS if key in schema.names), None)
    if label is None and (others := [name for name in schema.names if "label" in name]):
        raise ValueError(f"{file} has no column `label`, but {others}: rename the right one")
    for batch in table.iter_batches(batch_size=256, columns=[image, label] if label else [image]):
        images = [v["bytes"] if isinstance(v, dict) else v for v in batch.column(image).to_pylist()]
        labels = batch.column(label).to_pylist() if label else [None] * len(batch)
        for image_bytes, number in zip(images, labels, strict=True):
            # Packing lists b"" with the images that cannot be decoded, and refuses a label of -1.
            missing = -1 if label else None
            known = missing if number is None else label_of(number, where=f"{file}: {label}")
            yield image_bytes or b"", known


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types  # optional: only this source needs it

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(file: Path) -> tuple[str, ...] | None:
    """The names of the labels in the metadata that Hugging Face adds to a file."""
    from pyarrow import parquet  # optional: only this source needs it

    metadata = parquet.read_schema(file).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    label = next((features[key] for key in LABEL_KEYS if key in features), None)
    names = label.get("names") if isinstance(label, dict) else None
    return tuple(names) if names else None
