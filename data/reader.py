"""Reading a dataset's files in spite of failures.

A `Reader` repeats a read that failed, from the byte it had reached, after pauses that grow. After
`retries` more attempts it raises one error that names file and byte.
"""

import hashlib
import http.client
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from data.config import FetchConfig, is_local, shown
from data.stores import FINAL, open_store

_T = TypeVar("_T")

# Beyond the end of any file.
_END = 1 << 62
_LONGEST_PAUSE_S = 10.0
_TRANSIENT = (OSError, http.client.HTTPException)


class _WrongChecksumError(OSError):
    """Content was transferred wrongly, or is wrong where it is."""


class Reader:
    """Reads ranges of files under `root`: a directory, an http(s) or fsspec URL, or `pipe:...`.

    `name` is the root as messages show it; `sharers` is as in `data.stores.LocalStore`.
    """

    def __init__(self, root: str, *, config: FetchConfig, sharers: int = 1) -> None:
        self.root, self.name, self._config = root, shown(root), config
        self._store = open_store(root, config.timeout_s, sharers=sharers)

    @property
    def seekable(self) -> bool:
        """False for commands that can only write a file from its beginning."""
        return self._store.seekable

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where unknown; OSError where it is missing or out of reach."""
        return self._persist(name, lambda: self._store.size(name))

    def read(self, name: str, *, first: int, size: int) -> bytes:
        """`size` bytes of a file from byte `first` on; OSError where retries do not help."""
        if is_local(self.root):
            # The handle may be stale, which is no fault of the disk: open again, without a pause.
            try:
                content = b"".join(self._store.pieces(name, first=first, last=first + size))
            except FINAL:
                raise
            except OSError:
                content = b""
            if len(content) == size:
                return content
            self._store.close()
        return b"".join(self.pieces(name, first=first, last=first + size))

    def glimpse(self, name: str, *, first: int, size: int) -> bytes:
        """A range as one attempt reads it, perhaps shorter than `size`; for messages.

        Raises:
            OSError: it cannot be read, or not from there.
        """
        if first < 0 or not self.seekable:
            raise OSError(f"{self.name}/{name} cannot be read from byte {first}")
        return b"".join(self._store.pieces(name, first=first, last=first + size))

    def whole(self, name: str, *, sha256: str | None = None) -> bytes:
        """All of a small file.

        Raises:
            OSError: it could not be read.
            ValueError: it had another checksum than `sha256` each time.
        """

        def attempt() -> bytes:
            size = self._store.size(name)
            content = b"".join(
                self._store.pieces(name, first=0, last=_END if size is None else size)
            )
            if size not in (None, len(content)):
                raise OSError(f"it has {len(content)} bytes instead of {size}")
            if sha256 not in (None, hashlib.sha256(content).hexdigest()):
                raise _WrongChecksumError
            return content

        try:
            return self._persist(name, attempt)
        except OSError as error:
            if not isinstance(error.__cause__, _WrongChecksumError):
                raise
            raise ValueError(
                f"{self.name}/{name} is damaged or of another packing: its checksum is not the "
                "manifest's; copy or pack it again"
            ) from None

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """The bytes [first, last) in pieces, resuming from the byte reached after a failure.

        Raises:
            OSError: as `read`.
        """
        failures = 0
        while first < last:
            try:
                for piece in self._store.pieces(name, first=first, last=last):
                    first += len(piece)
                    yield piece
                if first < last:
                    raise OSError(f"it ended {last - first} bytes early")
            except FINAL:
                raise
            except _TRANSIENT as error:
                self._store.close()  # a file handle may be stale
                self._pause(name, first, failures, error)
                failures += 1

    def forget(self, name: str, *, first: int, size: int) -> None:
        """Discard what is kept of a range, here only the open files."""
        self._store.close()

    def close(self) -> None:
        """Close all files."""
        self._store.close()

    def _persist(self, name: str, attempt: Callable[[], _T]) -> _T:
        failures = 0
        while True:
            try:
                return attempt()
            except FINAL:
                raise
            except _TRANSIENT as error:
                self._pause(name, 0, failures, error)
                failures += 1

    def _pause(self, name: str, at: int, failures: int, error: Exception) -> None:
        if failures >= self._config.retries:
            raise OSError(
                f"{self.name}/{name}: reading stopped at byte {at} after {failures + 1} attempts: "
                f"{str(error) or type(error).__name__}"
            ) from error
        # Jitter, so that a thousand ranks do not return to a weak server at the same instant.
        pause = min(0.2 * 2 ** min(failures, 9), _LONGEST_PAUSE_S)
        time.sleep(pause * random.uniform(0.5, 1.0))
