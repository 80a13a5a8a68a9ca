"""A node's own copy of what its ranks read over a network: bounded, shared, disposable.

The shards are cut into chunks, which are numbered through the dataset. Chunk c belongs into slot
c mod slots, one file each, written under another name and renamed. So the bound holds by itself,
processes need not coordinate, and a dataset that fits is fetched once. What is read from here is
checked against the index's checksums like all data; a sample that fails is fetched again.
"""

import hashlib
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data import files
from data.config import FetchConfig
from data.reader import Reader

CHUNK = 1 << 20
# An unfinished write that is so old is of a process that was killed.
_ABANDONED_S = 3600.0
# The first bytes of a slot: which chunk it holds.
_STAMP = struct.Struct("<q")


class CachedReader(Reader):
    """A `Reader` of one dataset that keeps what it reads in a directory of the node.

    Args:
        directory: the dataset's own one in the cache.
        tars: bytes of each tar by name, in the manifest's order.
    """

    def __init__(
        self, root: str, *, config: FetchConfig, sharers: int, directory: Path, tars: dict[str, int]
    ) -> None:
        super().__init__(root, config=config, sharers=sharers)
        self._directory, self._tars = directory, tars
        self._slots = max(int(config.cache_gb * 2**30) // (CHUNK + _STAMP.size), 1)
        self._first: dict[str, int] = {}
        chunks = 0
        for name, size in tars.items():
            self._first[name] = chunks
            chunks += -(-size // CHUNK)
        self._locks = [threading.Lock() for _ in range(64)]
        self._usable = True
        self._wrong: set[Path] = set()
        with self._attempt():
            self._open()

    def read(self, name: str, *, first: int, size: int) -> bytes:
        """As `Reader.read`."""
        return b"".join(
            self._part(name, chunk, first, first + size) for chunk in _chunks(first, size)
        )

    def whole(self, name: str, *, sha256: str | None = None) -> bytes:
        """As `Reader.whole`; a file with the right checksum is kept beside the slots."""
        path = self._directory / name
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            content = super().whole(name, sha256=sha256)
            self._write(path, content)
        return content

    def forget(self, name: str, *, first: int, size: int) -> None:
        """Delete the chunks of a range: their content was wrong."""
        for chunk in _chunks(first, size):
            slot = self._slot(name, chunk)
            try:
                slot.unlink(missing_ok=True)
            except OSError:  # it is another user's, say: stop reading it
                self._wrong.add(slot)

    def _part(self, name: str, chunk: int, first: int, last: int) -> bytes:
        """The bytes of [first, last) of a tar that lie in one chunk."""
        begin = chunk * CHUNK
        low, high = max(first - begin, 0), min(last - begin, CHUNK)
        found = self._lookup(name, chunk, low, high)
        if found is not None:
            return found
        if not self._usable:
            return super().read(name, first=begin + low, size=high - low)
        with self._lock(name, chunk):
            found = self._lookup(name, chunk, low, high)
            return self._fetch(name, chunk)[low:high] if found is None else found

    def _lock(self, name: str, chunk: int) -> threading.Lock:
        """A lock, so that no two threads of this process fetch the same chunk."""
        what = self._first[name] + (chunk if self.seekable else 0)
        return self._locks[what % len(self._locks)]

    def _lookup(self, name: str, chunk: int, low: int, high: int) -> bytes | None:
        """The bytes [low, high) of a chunk, if its slot holds it."""
        slot = self._slot(name, chunk)
        if slot in self._wrong:
            return None
        try:
            with slot.open("rb") as file:
                stamp = file.read(_STAMP.size)
                if stamp != _STAMP.pack(self._first[name] + chunk):
                    return None
                file.seek(low, os.SEEK_CUR)
                part = file.read(high - low)
        except OSError:
            return None  # missing or unreadable: read the original
        return part if len(part) == high - low else None

    def _fetch(self, name: str, wanted: int) -> bytes:
        """Fetch a chunk and keep it, with all others of the tar if the store is not seekable."""
        first, last = 0, self._tars[name]
        if self.seekable:
            first, last = wanted * CHUNK, min((wanted + 1) * CHUNK, last)
        found = b""
        contents = _in_chunks(self.pieces(name, first=first, last=last))
        for chunk, content in enumerate(contents, start=first // CHUNK):
            stamp = _STAMP.pack(self._first[name] + chunk)
            self._write(self._slot(name, chunk), stamp + content)
            if chunk == wanted:
                found = content
        return found

    def _slot(self, name: str, chunk: int) -> Path:
        return self._directory / f"{(self._first[name] + chunk) % self._slots:08d}"

    def _write(self, path: Path, content: bytes) -> None:
        # Not `files.write`, which syncs: what a power cut damages here is fetched again.
        if not self._usable:
            return
        aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with self._attempt():
            try:
                aside.write_bytes(content)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def _open(self) -> None:
        """Make the directory; delete slots beyond the bound, and unfinished writes."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            is_slot = path.name.isdecimal()
            is_aside = not is_slot and path.suffix[1:].isdecimal()
            with suppress(FileNotFoundError):  # renamed by its process since
                if (is_slot and int(path.name) >= self._slots) or (
                    is_aside and files.age(path) > _ABANDONED_S
                ):
                    path.unlink()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Write, or continue without the cache: a full disk costs speed, but not the run."""
        try:
            yield
        except OSError as error:
            self._usable = False
            said = f"data.cache = {self._directory}: {files.reason(error)}"
            with suppress(OSError):  # the output may be on the same disk
                print(f"{said}; continuing without the cache", file=sys.stderr)


def _chunks(first: int, size: int) -> range:
    """The chunks of a tar in which a range of its bytes lies."""
    return range(first // CHUNK, -(-(first + size) // CHUNK))


def _in_chunks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= CHUNK:
            yield bytes(buffer[:CHUNK])
            del buffer[:CHUNK]
    if buffer:
        yield bytes(buffer)
