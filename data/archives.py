"""Sources that are datasets already: WebDataset tars, Hugging Face parquet, LSUN's lmdb.

Packing reads images in shuffled order. Tars and lmdb allow that; parquet, whose images lie
compressed in groups, is unpacked once, next to the shards in the making.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data.manifest import NO_CLASS
from data.shards import write_atomically
from data.sources import Digits, Folder, Listing, Source, Zip, by_number_if_any
from data.tars import IMAGE_SUFFIXES, scan_tar


def open_source(text: str, *, staging: Path) -> Source:
    """The source that the command line means; parquet is unpacked into `staging`.

    Raises:
        ValueError: nothing of the known kinds is there.
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
            files = sorted(path.parent.glob(path.name))
        else:
            files = sorted(path.glob(f"*{suffix}"))
            if files and any(_holds_images(child) for child in path.iterdir()):
                raise ValueError(
                    f"SOURCE = {text} holds {files[0].name} and directories of images: to pack "
                    "either, put them apart"
                )
        if files and all(file.is_file() for file in files):
            return kind(files, staging=staging)
    if path.is_dir():
        return Folder(path)
    raise ValueError(
        f"SOURCE = {text} is neither a folder, zip, tar, parquet or lmdb of images, nor `digits`"
    )


#: What Hugging Face names the files of a split after.
_SPLITS = {"train", "test", "validation", "val", "dev"}


class Tars:
    """Existing WebDataset shards; labels from `.cls` or `.json`, if there are any."""

    def __init__(self, files: list[Path], *, staging: Path) -> None:
        self._files = {file.name: file for file in files}

    def listing(self) -> Listing:
        names: list[str] = []
        labels: list[int | None] = []
        for file in self._files.values():
            for sample in scan_tar(file):
                names.append(f"{file.name}@{sample.offset}+{sample.size}/{sample.name}")
                labels.append(sample.label)
        return by_number_if_any(names, labels)

    def read(self, name: str) -> bytes:
        file, _, extent = name.partition("/")[0].rpartition("@")
        return _read_extent(self._files[file], extent)


class Parquet:
    """Hugging Face image datasets: a column of image bytes, and one of class labels."""

    def __init__(self, files: list[Path], *, staging: Path) -> None:
        splits = {file.name.partition("-")[0] for file in files if "-" in file.name}
        if len(splits & _SPLITS) > 1:
            raise ValueError(
                f"SOURCE = {files[0].parent} holds the splits {', '.join(sorted(splits))}: name "
                f"one, such as '{files[0].parent}/train-*.parquet'"
            )
        self._files, self._staging = files, staging

    def listing(self) -> Listing:
        names: list[str] = []
        labels: list[int | None] = []
        for file in self._files:
            for extent, label in self._unpacked(file):
                names.append(f"{file.name}@{extent}")
                labels.append(label)
        listing = by_number_if_any(names, labels)
        classes = _class_names(self._files[0]) if NO_CLASS not in listing.classes else None
        return replace(listing, classes=classes or listing.classes)

    def read(self, name: str) -> bytes:
        file, _, extent = name.rpartition("@")
        return _read_extent(self._staging / f"{file}.blob", extent)

    def _unpacked(self, file: Path) -> list[tuple[str, int | None]]:
        """Extent and label of each image, after unpacking them all into one file."""
        done = self._staging / f"{file.name}.extents"
        if not done.exists():
            extents = []
            with (self._staging / f"{file.name}.blob").open("wb") as blob:
                for image, label in _rows(file):
                    extents.append((f"{blob.tell()}+{len(image)}", label))
                    blob.write(image)
                blob.flush()
                os.fsync(blob.fileno())
            write_atomically(done, json.dumps(extents).encode())
        return [(extent, label) for extent, label in json.loads(done.read_text())]


class Lmdb:
    """LSUN's layout: one category, image files by key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def listing(self) -> Listing:
        with self._database.begin() as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
        return Listing(names=keys, labels=[0] * len(keys), classes=(self._path.name,))

    def read(self, name: str) -> bytes:
        with self._database.begin() as transaction:
            return bytes(transaction.get(name.encode("latin-1")))

    @cached_property
    def _database(self) -> Any:
        import lmdb  # optional: only this source needs it

        return lmdb.open(str(self._path), readonly=True, lock=False, readahead=False)


def _holds_images(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(directory))


def _read_extent(path: Path, extent: str) -> bytes:
    offset, size = map(int, extent.split("+"))
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _rows(file: Path) -> Iterator[tuple[bytes, int | None]]:
    from pyarrow import parquet, types  # optional: only this source needs it

    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    image = next((f.name for f in schema if types.is_struct(f.type) or _is_bytes(f.type)), None)
    if image is None:
        raise ValueError(f"{file} has no column of images among {schema.names}")
    label = "label" if "label" in schema.names else None
    if label is None and (others := [name for name in schema.names if "label" in name]):
        raise ValueError(f"{file} has no column `label`, but {others}: rename the one you mean")
    for batch in table.iter_batches(batch_size=256, columns=[image, label] if label else [image]):
        images = [v["bytes"] if isinstance(v, dict) else v for v in batch.column(image).to_pylist()]
        labels = batch.column(label).to_pylist() if label else [None] * len(batch)
        for image_bytes, number in zip(images, labels, strict=True):
            # Where there is none, packing will list it with those that cannot be decoded.
            yield image_bytes or b"", -1 if label and number is None else number


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types  # optional: only this source needs it

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(file: Path) -> tuple[str, ...] | None:
    """What Hugging Face's metadata in the file call the labels."""
    from pyarrow import parquet  # optional: only this source needs it

    metadata = parquet.read_schema(file).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    return tuple(names) if names else None
