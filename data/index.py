"""The index of a shard: `NAME.idx.npy` holds place, label and checksum of every image in NAME.tar.

One row per image, of `data.tars.INDEX_DTYPE`, in the order of the tar.
"""

import io
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.tars import INDEX_DTYPE, Index

# numpy reads an array's header with `ast`, which Python 3.11 cannot do in two threads at once.
_READING = threading.Lock()


def map_index(path: Path, *, samples: int) -> Index:
    """The rows (samples,) of a local index file, mapped into memory that all processes share.

    Raises:
        OSError: it is missing or unreadable.
        ValueError: it is damaged, or has another number of rows.
    """
    if not samples:  # an empty array cannot be mapped
        return parse_index(path.read_bytes(), samples=0, where=path)
    try:
        with _READING:
            index: Index = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return _checked(index, samples, path)


def parse_index(content: bytes, *, samples: int, where: Path | str) -> Index:
    """The rows (samples,) in the content of an index file; `where` names it in messages.

    Raises:
        ValueError: as `map_index`.
    """
    file: BinaryIO = io.BytesIO(content)
    try:
        with _READING:
            index: Index = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    return _checked(index, samples, where)


def _checked(index: Index, samples: int, where: Path | str) -> Index:
    if index.dtype != INDEX_DTYPE or index.shape != (samples,):
        kind = "" if index.dtype == INDEX_DTYPE else " of another kind"
        raise ValueError(
            f"{where} has {index.size} rows{kind}, the manifest says {samples} samples: "
            "copy or pack it again"
        )
    return index
