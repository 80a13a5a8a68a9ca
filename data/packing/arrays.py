"""Arrays as a source of images: sample files (`.npz` with `arr_0`, `arr_1`) and CIFAR's own files.

Sample files are those of ADM's evaluator and of `python -m trainer.sample`. They are compressed or
too large for each process's memory, so they are unpacked once, into a directory of the packing.
"""

import codecs
import io
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data import files, npz
from data.config import naming
from data.packing.listing import Listing, by_number, without_labels
from data.packing.sources import Archives, OneFile, unpacked_name
from data.transforms import Pixels, png

# The only types that pickles of CIFAR may load; numpy 2 renamed the module of the first.
_CIFAR_TYPES = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
_CIFAR_ROW = 3 * 32 * 32


class SampleFile(OneFile):
    """Images uint8 (N, H, W, 3) in `arr_0` of an `.npz`, and perhaps labels (N,) in `arr_1`."""

    def __init__(self, path: Path, *, staging: Path) -> None:
        super().__init__(path)
        self._staging = staging

    def listing(self) -> Listing:
        """As `Source.listing`."""
        with _members(self._path) as archive, naming(f"SOURCE = {self._path}"):
            with archive.open("arr_0.npy") as stream:
                shape, is_fortran, dtype = npz.read_header(stream)
            if is_fortran:
                raise ValueError("arr_0 is in Fortran's order: save it in C's")
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(f"arr_0 is {dtype} {shape}: must be uint8 (N, H, W, 3)")
            names = [f"{i:08d}" for i in range(shape[0])]
            if "arr_1.npy" not in archive.namelist():
                return without_labels(names)
            labels = np.lib.format.read_array(archive.open("arr_1.npy"), allow_pickle=False)
            if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
                kind = f"{labels.dtype} {labels.shape}"
                raise ValueError(f"arr_1 is {kind}: must be integers {shape[:1]}")
        return by_number(names, labels.tolist())

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        return png(np.load(self._unpacked(), mmap_mode="r")[int(name)], compress_level=1)

    def stage(self) -> None:
        """As `Source.stage`."""
        if self._unpacked().exists():
            return
        print(f"unpacking {self._path.name}", file=sys.stderr)
        with _members(self._path) as archive, files.whole(self._unpacked()) as unpacked:
            shutil.copyfileobj(archive.open("arr_0.npy"), unpacked, 1 << 20)

    def _unpacked(self) -> Path:
        return self._staging / f"{unpacked_name(self._path)}.blob"


class Cifar(Archives):
    """CIFAR-10 or CIFAR-100 as published: pickled or binary batches of 32 x 32 images."""

    def listing(self) -> Listing:
        """As `Source.listing`."""
        if {file.name.startswith("test") for file in self.files} == {True, False}:
            is_100 = self.files[0].name == "test"
            train, test = ("train", "test") if is_100 else ("'data_batch_*'", "'test_batch*'")
            raise ValueError(
                f"SOURCE = {self.root} holds the splits train and test: give one: "
                f"{self.root}/{train} or {self.root}/{test}"
            )
        names, labels = [], []
        for file in self.files:
            found = _cifar(file)[1]
            names += [f"{file.name}@{row}" for row in range(len(found))]
            labels += found
        listing = by_number(names, labels)
        classes = _cifar_classes(self.root)
        return Listing(names=names, labels=labels, classes=classes or listing.classes)

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, row = name.rpartition("@")
        pixels = _cifar(self.root / file)[0][int(row)]
        return png(np.ascontiguousarray(pixels), compress_level=1)


def cifar_files(path: Path) -> list[Path]:
    """The batches of CIFAR that a path means: a file, their directory, or a pattern."""
    if path.is_dir():
        found = [*path.glob("data_batch_*"), *path.glob("test_batch*")]
        found = found or [path / "test", path / "train"]  # of CIFAR-100
    else:
        found = [path] if path.is_file() else list(path.parent.glob(path.name))
    names = ("batches.meta", "batches.meta.txt", "meta")
    is_cifar = found and any((found[0].parent / name).is_file() for name in names)
    kinds = ("data_batch_", "test_batch", "train", "test")
    return sorted(f for f in found if is_cifar and f.is_file() and f.name.startswith(kinds))


@cache
def _cifar(file: Path) -> tuple[Pixels, list[int]]:
    """Images uint8 (N, 32, 32, 3) and labels of a batch."""
    pixels: Any
    if file.suffix == ".bin":
        try:
            rows = np.fromfile(file, np.uint8).reshape(-1, 1 + _CIFAR_ROW)
        except ValueError as error:
            raise ValueError(f"SOURCE: {file} is no batch of CIFAR: {error}") from None
        pixels, labels = rows[:, 1:], rows[:, 0].tolist()
    else:
        batch = _unpickled(file)
        pixels, labels = batch.get(b"data"), batch.get(b"labels") or batch.get(b"fine_labels")
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_array or pixels.shape[1:] != (_CIFAR_ROW,) or not _all_of(int, labels):
        raise ValueError(f"SOURCE: {file} is no batch of CIFAR: it has no `data` and `labels`")
    if len(pixels) != len(labels):
        raise ValueError(f"SOURCE: {file} has {len(labels)} labels for {len(pixels)} images")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _cifar_classes(root: Path) -> tuple[str, ...]:
    """The names of the classes, or ()."""
    if (text := root / "batches.meta.txt").is_file():
        return tuple(text.read_text().split())
    meta = next((m for m in (root / "batches.meta", root / "meta") if m.is_file()), None)
    if meta is None:
        return ()
    found = _unpickled(meta)
    names = found.get(b"label_names") or found.get(b"fine_label_names") or []
    if not _all_of(bytes, names):
        raise ValueError(f"SOURCE: {meta} has no list of class names: copy it again")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _unpickled(file: Path) -> dict[bytes, Any]:
    """The content of a pickle of CIFAR; ValueError where it is damaged or could run code."""
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # unpickling meets damage with errors of any type
        raise ValueError(f"SOURCE: {file} is no file of CIFAR: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"SOURCE: {file} is no file of CIFAR: it holds a {type(found).__name__}")
    return found


def _all_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


class _Unpickler(pickle.Unpickler):
    """Loads arrays and refuses every other type, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CIFAR_TYPES:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return _CIFAR_TYPES[module, name]


@contextmanager
def _members(path: Path) -> Iterator[zipfile.ZipFile]:
    """An `.npz` file, opened; ValueError where it is damaged or lacks an array."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"SOURCE = {path} is no readable sample file: {error}") from None
