"""Stored images as bytes: each is read with its tar header and checked against the index.

A header or size that differs from the index means a replaced or truncated shard, and stops the run.
A wrong checksum means one damaged image, unless other images of the shard have wrong ones, too.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache import CachedReader
from data.config import FetchConfig, expanded, is_local
from data.dataset import Shards
from data.index import INDEX_DTYPE, Index, first_row
from data.reader import Reader
from data.tars import HEADER, read_header

_ADVICE = "run `python -m data.shards verify --full`"


class BadSampleError(Exception):
    """One damaged stored image: the message gives shard, key and reason."""


class StoredImage(NamedTuple):
    """A stored image: where it is (shard and key), the file's bytes, its label."""

    where: str
    content: memoryview
    label: int


class StoredImages:
    """Random access to the stored images of a dataset by shard and row.

    `sharers` is how many datasets this process reads.

    Raises:
        ValueError: a command that can only read a file from its beginning, and no cache.
    """

    def __init__(self, shards: Shards, *, config: FetchConfig, sharers: int = 1) -> None:
        self._shards, self._where = shards, shards.where
        self._tars = [shard.tar for shard in shards.shards]
        # With a cache, a directory is read like a server: it may be a network mount.
        self._local = is_local(shards.root) and config.cache is None
        self._reader = _open_reader(shards, config, sharers)
        self._rows_at: dict[int, int] = {}
        self._indexes: dict[int, Index] = {}

    def read(self, shard: int, row: int) -> StoredImage:
        """One stored image.

        Raises:
            BadSampleError: its checksum is wrong.
            ValueError: the shard is not what its index says.
            OSError: the shard cannot be read.
        """
        try:
            return self._checked(shard, row)
        except (BadSampleError, ValueError):
            # Perhaps only what was read is wrong: a damaged cache, a stale handle, a flipped bit.
            first, size, _, _ = self._entry(shard, row)
            self._reader.forget(self._tars[shard], first=first, size=size)
        try:
            return self._checked(shard, row)
        except BadSampleError:
            self._demand_others_intact(shard, row)
            raise

    def key(self, shard: int, row: int) -> str:
        """The shard and the key of a stored image, or its row where the key cannot be read."""
        return f"{self._tars[shard]}: {self._key(shard, row)}"

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _checked(self, shard: int, row: int) -> StoredImage:
        first, size, label, crc32 = self._entry(shard, row)
        try:
            raw = self._reader.read(self._tars[shard], first=first, size=size)
        except OSError as error:
            key = self._key(shard, row) if self._local else f"image {row}"
            raise OSError(f"{error}; while reading {key}, at byte {first}") from error
        tar = f"{self._where}/{self._tars[shard]}"
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
            raise BadSampleError(f"{tar}: {name} has another checksum than the index says")
        return StoredImage(f"{tar}: {name}", content, label)

    def _key(self, shard: int, row: int) -> str:
        """An image's key for a message, as `Shards.key`."""
        first = self._entry(shard, row)[0]
        return self._shards.key(shard, row, first=first, reader=self._reader)

    def _entry(self, shard: int, row: int) -> tuple[int, int, int, int]:
        """First byte and size of header and payload, label, and the payload's crc32."""
        found = self._local_row(shard, row) if self._local else self._index(shard)[row]
        offset, size, label, crc32 = found.item()
        return offset - HEADER, size + HEADER, label, crc32

    def _local_row(self, shard: int, row: int) -> Index:
        """A row of a local index, read from its file: mapping all indexes would keep them all open.

        The header of a file is read once: as a run starts, every worker of every rank opens it.
        """
        entry = self._shards.shards[shard]
        try:
            if shard not in self._rows_at:
                where = f"{self._where}/{entry.index}"
                read = partial(self._reader.read, entry.index)
                self._rows_at[shard] = first_row(read, samples=entry.samples, where=where)
            first = self._rows_at[shard] + row * INDEX_DTYPE.itemsize
            raw = self._reader.read(entry.index, first=first, size=INDEX_DTYPE.itemsize)
        except OSError as error:
            raise OSError(f"{error}; while reading the index row of image {row}") from error
        return np.frombuffer(raw, INDEX_DTYPE)

    def _index(self, shard: int) -> Index:
        """The index of a shard that is read over a network, kept in memory."""
        if shard not in self._indexes:
            self._indexes[shard] = self._shards.read_index(shard, self._reader)
        return self._indexes[shard]

    def _demand_others_intact(self, shard: int, row: int) -> None:
        """Raise ValueError if other images of the shard are damaged, too: it was replaced."""
        rows = self._shards.shards[shard].samples
        for other in {0, rows // 2, rows - 1} - {row}:
            try:
                self._checked(shard, other)
            except BadSampleError:
                raise ValueError(
                    f"{self._where}/{self._tars[shard]}: several images have wrong checksums; "
                    f"the shard was replaced or is damaged throughout: {_ADVICE}"
                ) from None


def _open_reader(shards: Shards, config: FetchConfig, sharers: int) -> Reader:
    """A reader of the dataset, through the node's cache if one is set."""
    if config.cache:
        return CachedReader(
            shards.root,
            config=config,
            sharers=sharers,
            directory=Path(expanded(config.cache, name="data.cache")) / shards.fingerprint[:16],
            tars={shard.tar: shard.bytes for shard in shards.shards},
        )
    reader = Reader(shards.root, config=config, sharers=sharers)
    if not reader.seekable:
        raise ValueError(
            f"data.shards = {shards.where} cannot read from the middle of a file: add {{first}} "
            "and {last} to the command, or set data.cache"
        )
    return reader
