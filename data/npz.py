"""Arrays in `.npz` files, which are zips of a member `NAME.npy` for each, by parts and in full.

Sample files are larger than memory: their header is read alone, their images in a stream or mapped.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

# Bytes of a zip file's local header before the name.
_LOCAL_HEADER = 30
# Bytes that are read at once.
_PIECE = 2**20


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of the array; read at the stream's position."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(stream)
    return found


def image_header(shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file of uint8, of this shape."""
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    """The content of an array's `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def add(archive: zipfile.ZipFile, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write small arrays, uncompressed and without a date: equal arrays make equal files."""
    for name, array in arrays.items():
        archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy(array))


def read(path: Path, name: str) -> NDArray[Any]:
    """One array of a file, whose checksum is checked; ValueError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(f"{name}.npy")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # zipfile raises errors of many types for damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from None


def check(path: Path, name: str) -> None:
    """Raise ValueError unless all bytes of an array are as they were written; reads them."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            while stream.read(_PIECE):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}: copy or make it again") from None


def mapped(path: Path, name: str) -> NDArray[Any]:
    """One array of a file, mapped into memory, or read in full if it is compressed.

    Raises:
        Exception: of many types, where the file is damaged or something else.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as file:
            array: NDArray[Any] = file[name]
            return array
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        file.seek(first := info.header_offset + _LOCAL_HEADER + sum(lengths))
        shape, fortran, dtype = read_header(file)
        at, order = file.tell(), "F" if fortran else "C"
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or not size:
            raise ValueError(f"{name} is {dtype} {shape}")
        if (there := info.file_size - (at - first)) != size:
            raise ValueError(f"{name} is {dtype} {shape} and has {there} bytes instead of {size}")
    return np.memmap(path, dtype=dtype, mode="r", offset=at, shape=shape, order=order)  # type: ignore[call-overload]
