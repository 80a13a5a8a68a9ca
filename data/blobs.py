"""Stored images as bytes: each is read with its tar header and checked against the index.

A header or size that disagrees with the index means another or a torn shard, and stops the run; a
checksum that disagrees means one damaged image, unless its neighbours' disagree as well.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache import CachedReader
from data.fetch import FetchConfig, Reader, is_local
from data.manifest import Shards, rows_at
from data.tars import HEADER, INDEX_DTYPE, Index, read_header

_ADVICE = "run `python -m data.shards verify --full`"


class BadSampleError(Exception):
    """One stored image that is damaged: its shard, key and why."""


class Blob(NamedTuple):
    """A stored image: where it is (shard and key), the file's bytes, its label."""

    where: str
    content: memoryview
    label: int


class Blobs:
    """Random access to the stored images of a dataset by shard and row.

    Raises:
        ValueError: a pipe that only reads forward, and no cache.
    """

    def __init__(self, shards: Shards, *, config: FetchConfig) -> None:
        self._shards = shards
        self._local = is_local(shards.root)
        self._reader = _open_reader(shards, config)
        self._rows_at: dict[int, int] = {}
        self._indexes: dict[int, Index] = {}

    def read(self, shard: int, row: int) -> Blob:
        """One stored image.

        Raises:
            BadSampleError: it does not have its checksum.
            ValueError: the shard is not what its index says.
            OSError: the shard cannot be read.
        """
        try:
            return self._checked(shard, row)
        except (BadSampleError, ValueError):
            # Perhaps only the way here was bad: a cache, a stale file handle, a flipped bit.
            first, size, _, _ = self._entry(shard, row)
            self._reader.forget(self._shards.shards[shard].tar, first=first, size=size)
        try:
            return self._checked(shard, row)
        except BadSampleError:
            self._demand_others_intact(shard, row)
            raise

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _checked(self, shard: int, row: int) -> Blob:
        first, size, label, crc32 = self._entry(shard, row)
        try:
            raw = self._reader.read(self._shards.shards[shard].tar, first=first, size=size)
        except OSError as error:
            key = self._key(shard, row) if self._local else f"image {row}"
            raise OSError(f"{error}; wanted was {key}, at byte {first}") from error
        tar = f"{self._shards.root}/{self._shards.shards[shard].tar}"
        try:
            name, stated = read_header(raw[:HEADER])
        except ValueError as error:
            raise ValueError(
                f"{tar}: no tar header of {self._key(shard, row)} at byte {first}, where the "
                f"index has one ({error}); the shard is damaged: {_ADVICE}"
            ) from None
        if stated != size - HEADER:
            raise ValueError(
                f"{tar}: {name} has {stated} bytes, the index says {size - HEADER}; "
                f"the shard was damaged or replaced: {_ADVICE}"
            )
        content = memoryview(raw)[HEADER:]
        if zlib.crc32(content) != crc32:
            raise BadSampleError(f"{tar}: {name} does not have the checksum of its index")
        return Blob(f"{tar}: {name}", content, label)

    def _key(self, shard: int, row: int) -> str:
        """A sample's name for a message, as its own header has it or that of its label before."""
        first = self._entry(shard, row)[0]
        for at in (first, first - 2 * HEADER):
            try:
                raw = self._reader.glimpse(self._shards.shards[shard].tar, first=at, size=HEADER)
                return read_header(raw)[0].partition(".")[0]
            except (OSError, ValueError):
                continue
        return f"image {row}"

    def _entry(self, shard: int, row: int) -> tuple[int, int, int, int]:
        """First byte and size of header and payload, label, and the payload's crc32."""
        found = self._local_row(shard, row) if self._local else self._index(shard)[row]
        offset, size, label, crc32 = found.item()
        return offset - HEADER, size + HEADER, label, crc32

    def _local_row(self, shard: int, row: int) -> Index:
        """A row read from its file: a mapping of each index would keep each of them open."""
        if shard not in self._rows_at:
            self._rows_at[shard] = rows_at(Path(self._shards.root), self._shards.shards[shard])
        first = self._rows_at[shard] + row * INDEX_DTYPE.itemsize
        name = self._shards.shards[shard].index
        try:
            raw = self._reader.read(name, first=first, size=INDEX_DTYPE.itemsize)
        except OSError as error:
            raise OSError(f"{error}; wanted was the row of image {row}") from error
        return np.frombuffer(raw, INDEX_DTYPE)

    def _index(self, shard: int) -> Index:
        """The index of a shard that lies elsewhere, kept in memory."""
        if shard not in self._indexes:
            entry = self._shards.shards[shard]
            content = self._reader.whole(entry.index, sha256=entry.index_sha256)
            self._indexes[shard] = self._shards.parse_index(shard, content)
        return self._indexes[shard]

    def _demand_others_intact(self, shard: int, row: int) -> None:
        """Tell one damaged image from a shard that is another one of the same name."""
        rows = self._shards.shards[shard].samples
        for other in {0, rows // 2, rows - 1} - {row}:
            try:
                self._checked(shard, other)
            except BadSampleError:
                raise ValueError(
                    f"{self._shards.root}/{self._shards.shards[shard].tar}: several images do not "
                    "have their checksums; the shard was replaced or is damaged throughout: "
                    f"{_ADVICE}"
                ) from None


def _open_reader(shards: Shards, config: FetchConfig) -> Reader | CachedReader:
    """The way to the bytes of a dataset, through the node's cache if there is one to use."""
    reader = Reader(shards.root, config=config)
    if config.cache and not is_local(shards.root):
        return CachedReader(
            reader,
            root=Path(config.cache) / shards.fingerprint[:16],
            tars={shard.tar: shard.bytes for shard in shards.shards},
            bound=int(config.cache_gb * 2**30),
        )
    if not reader.seeks:
        raise ValueError(
            f"data.shards = {shards.root} cannot read from the middle of a file: put {{first}} and "
            "{last} into the command, or give the node a data.cache"
        )
    return reader
