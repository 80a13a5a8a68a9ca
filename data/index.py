"""The index of a shard: `NAME.idx.npy` holds place, label and checksum of every image in NAME.tar.

One row per image, of `INDEX_DTYPE`, in the order of the tar.
"""

import io
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# One row of an index; offset, size and crc32 are those of the image's payload.
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")])
Index = NDArray[np.void]

# numpy parses an array's header with `ast`, which in Python 3.11 is not safe in two threads.
_READING = threading.Lock()
# The first bytes of a `.npy` file; two bytes with the size of its header follow.
_MAGIC = np.lib.format.magic(1, 0)
_START = len(_MAGIC) + 2


def first_row(read: Callable[..., bytes], *, samples: int, where: Path | str) -> int:
    """The byte of an index file at which its rows, (samples,), begin.

    `read(first=..., size=...)` gives bytes of the file; `where` names it in messages.

    Raises:
        ValueError: it is damaged, or has another number of rows.
    """
    start = read(first=0, size=_START)
    if not start.startswith(_MAGIC):
        raise ValueError(f"{where} is damaged: it does not begin as an array of numpy's")
    size = int.from_bytes(start[-2:], "little")
    file = io.BytesIO(start + read(first=_START, size=size))
    file.seek(len(_MAGIC))
    try:
        with _READING:
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if dtype != INDEX_DTYPE or shape != (samples,):
        kind = "" if dtype == INDEX_DTYPE else " of another kind"
        raise ValueError(
            f"{where} has {math.prod(shape)} rows{kind}, the manifest says {samples} samples: "
            "copy or pack it again"
        )
    return file.tell()


def parse_index(content: bytes, *, samples: int, where: Path | str) -> Index:
    """The rows (samples,) in the content of an index file; `where` names it in messages.

    Raises:
        ValueError: as `first_row`.
    """
    first = first_row(
        lambda first, size: content[first : first + size], samples=samples, where=where
    )
    try:
        return np.frombuffer(content, INDEX_DTYPE, count=samples, offset=first)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from None
