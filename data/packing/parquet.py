"""Hugging Face parquet as a source of images.

Packing reads images in shuffled order, and parquet compresses them in groups: it is unpacked once,
into a directory of the packing.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import files, npz
from data.packing.labels import LABEL_KEYS, Label, label_of
from data.packing.listing import Listing, by_label_if_any
from data.packing.names import first_of
from data.packing.sources import Archives, read_extent, unpacked_name
from data.packing.splits import check_files

# Columns of images in parquet, in the order in which they are preferred.
_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels", "image_bytes")


class Parquet(Archives):
    """Hugging Face image datasets: a column of image files, and perhaps one of class labels.

    A name is `FILE@ROW`.
    """

    def listing(self) -> Listing:
        """As `Source.listing`."""
        check_files(self.files, pattern=self._pattern)
        names: list[str] = []
        labels: list[Label | None] = []
        # The first file with each list of classes.
        of_classes: dict[tuple[str, ...], Path] = {}
        for file in self.files:
            table = _open(file)
            for row, label in enumerate(_labels(file, table)):
                names.append(f"{file.name}@{row}")
                labels.append(label)
            if table.metadata.num_rows:
                of_classes.setdefault(_class_names(file, table), file)
        listing = by_label_if_any(names, labels)
        if not listing.is_numbered:
            return listing
        (classes, first), *others = of_classes.items()
        if not others:
            return replace(listing, classes=classes or listing.classes)
        theirs, other = others[0]
        shown = [first_of(names) or "(none)" for names in (theirs, classes)]
        fault = (
            f"SOURCE: {other} has the class names {shown[0]}, {first} {shown[1]}: "
            "pack one by itself and the other with --classes-of, or give --class-map"
        )
        return replace(listing, fault=fault)

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, row = name.rpartition("@")
        ends, blob = self._unpacked(self.root / file)
        first, last = (int(end) for end in np.load(ends, mmap_mode="r")[int(row) : int(row) + 2])
        return read_extent(blob, first, last - first)

    def stage(self) -> None:
        """As `Source.stage`: unpack the images of each file, if they are not yet."""
        for number, file in enumerate(self.files, start=1):
            ends, blob = self._unpacked(file)
            if ends.exists():
                continue
            print(f"unpacking {file.name} ({number} of {len(self.files)})", file=sys.stderr)
            at = [0]
            with files.whole(blob) as unpacked:
                for image in _images(file):
                    unpacked.write(image)
                    at.append(at[-1] + len(image))
            files.write(ends, npz.npy(np.array(at, dtype=np.int64)))

    def _unpacked(self, file: Path) -> tuple[Path, Path]:
        """The unpacked files: where each image ends, and all images one after the other."""
        name = unpacked_name(file)
        return self._staging / f"{name}.ends.npy", self._staging / f"{name}.blob"


def _labels(file: Path, table: Any) -> Iterator[Label | None]:
    """The label of each row: None without a column of labels; -1, which is refused, if missing."""
    names = table.schema_arrow.names
    label = next((key for key in LABEL_KEYS if key in names), None)
    if label is None and (others := [name for name in names if "label" in name]):
        raise ValueError(f"{file} has no column `label`, but {others}: rename the right one")
    _image_column(file, table)
    if label is None:
        yield from itertools.repeat(None, table.metadata.num_rows)
        return
    for number in _values(file, table, label):
        yield -1 if number is None else label_of(number, where=f"{file}: {label}")


def _images(file: Path) -> Iterator[bytes]:
    """The image file of each row; where there is none b"", which packing leaves out."""
    table = _open(file)
    for value in _values(file, table, _image_column(file, table)):
        yield (value["bytes"] if isinstance(value, dict) else value) or b""


def _values(file: Path, table: Any, column: str) -> Iterator[Any]:
    """The values of a column; ValueError where the file is damaged there."""
    with _reading(file):
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.column(column).to_pylist()


def _open(file: Path) -> Any:
    """A parquet file; ValueError where it is damaged, or something else."""
    from pyarrow import parquet  # optional: only this source needs it

    with _reading(file):
        return parquet.ParquetFile(file)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise ValueError with the file's name for damage; pyarrow's errors do not name it."""
    from pyarrow import ArrowException  # optional: only this source needs it

    try:
        yield
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # a fault of the disk
        raise ValueError(f"{file} is no readable parquet file: {error}") from None


def _image_column(file: Path, table: Any) -> str:
    """The column of image files: one of bytes, or of structs that have `bytes`.

    Raises:
        ValueError: there is none, or several and none of them has a usual name.
    """
    fields = {field.name: field.type for field in table.schema_arrow}
    found = [name for name, kind in fields.items() if _holds_bytes(kind)]
    known = [name for name in _IMAGE_KEYS if name in found]
    if not found:
        raise ValueError(
            f"{file} has no column of images among {list(fields)}: must hold the bytes of image "
            "files; where it has addresses, download them first, for example with img2dataset"
        )
    if len(found) > 1 and not known:
        raise ValueError(
            f"{file} has several columns of bytes, {found}: name that of the images `image`"
        )
    return (known or found)[0]


def _holds_bytes(kind: Any) -> bool:
    """Whether a type of pyarrow's is bytes, or a struct whose `bytes` are."""
    from pyarrow import types  # optional: only this source needs it

    is_struct = types.is_struct(kind)
    kinds = [field.type for field in kind if field.name == "bytes"] if is_struct else [kind]
    return any(types.is_binary(each) or types.is_large_binary(each) for each in kinds)


def _class_names(file: Path, table: Any) -> tuple[str, ...]:
    """The names of the labels in the metadata that Hugging Face adds to a file, or ()."""
    found = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = _entry(_entry(json.loads(found), "info"), "features")
    except ValueError as error:
        raise ValueError(f"{file}: its metadata `huggingface` is damaged: {error}") from None
    label = next((found for key in LABEL_KEYS if (found := _entry(features, key))), None)
    names = _entry(label, "names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: names = {names!r:.80} in its metadata: must be a list of names")
    return tuple(names)


def _entry(found: object, name: str) -> Any:
    """The value of a key in a JSON object; None if it is missing, or `found` is no object."""
    return found.get(name) if isinstance(found, dict) else None
