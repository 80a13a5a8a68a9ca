"""Bytes of a dataset's files, wherever they lie: directories, http(s), s3 and the like, pipes.

A store opens one range of one file; a `Reader` around it goes on from the byte it had reached when
the store fails, after a pause that grows, and gives up with one clear error. webdataset's `gopen`
is imported here and nowhere else.
"""

import hashlib
import http.client
import os
import random
import select
import shlex
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from data import descriptors

_T = TypeVar("_T")

_PIECE = 1 << 16
_RANGE = 1 << 20  # what one answer of a driver has to bring in time
_END = 1 << 62  # beyond the end of any file
_LONGEST_PAUSE = 10.0

_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_TRANSIENT = (OSError, http.client.HTTPException)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How patiently to read, and where to keep what came over a network.

    `cache` is a directory of this node that all ranks share; it holds at most `cache_gb` of each
    dataset.
    """

    retries: int = 6
    timeout_s: float = 30.0
    cache: str | None = None
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.timeout_s <= 0 or self.cache_gb <= 0:
            raise ValueError(
                f"data.retries = {self.retries}, data.timeout_s = {self.timeout_s} and "
                f"data.cache_gb = {self.cache_gb}: retries at least 0, the others above 0"
            )


class Store(Protocol):
    """A place of files that can be read from any byte."""

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """The bytes [first, last) of a file, as they come."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where the store cannot tell."""
        ...

    def close(self) -> None: ...


class Reader:
    """Reads ranges of files under `root`: a directory, an http(s) or fsspec URL, or `pipe:...`."""

    def __init__(self, root: str, *, config: FetchConfig) -> None:
        self.root, self._config = root, config
        self._store = _open_store(root, config.timeout_s)

    @property
    def seeks(self) -> bool:
        """False for pipes that can only be read from the beginning."""
        return not isinstance(self._store, PipeStore) or self._store.ranged

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where unknown.

        Raises:
            OSError: it is missing or cannot be reached.
        """
        return self._persist(name, lambda: self._store.size(name))

    def read(self, name: str, *, first: int, size: int) -> bytes:
        """`size` bytes of a file from byte `first` on.

        Raises:
            OSError: they could not be read, even after retries.
        """
        if isinstance(self._store, LocalStore):
            try:
                content = self._store.read(name, first, size)
            except _FINAL:
                raise
            except OSError:
                content = b""  # a stale handle, perhaps: the way below opens the file again
            if len(content) == size:
                return content
        return b"".join(self.stream(name, first=first, last=first + size))

    def glimpse(self, name: str, *, first: int, size: int) -> bytes:
        """What one attempt reads of a range: perhaps less than `size`.

        Raises:
            OSError: it cannot be read, or not from there.
        """
        if first < 0 or not self.seeks:
            raise OSError(f"{self.root}/{name} cannot be read from byte {first}")
        return b"".join(self._store.pieces(name, first=first, last=first + size))

    def whole(self, name: str, *, sha256: str | None = None) -> bytes:
        """All of a small file.

        Raises:
            OSError: it could not be read, or had another checksum than `sha256` each time.
        """

        def attempt() -> bytes:
            size = self._store.size(name)
            content = b"".join(
                self._store.pieces(name, first=0, last=_END if size is None else size)
            )
            if size not in (None, len(content)):
                raise OSError(f"it has {len(content)} bytes instead of {size}")
            if sha256 not in (None, hashlib.sha256(content).hexdigest()):
                raise OSError("it does not have the manifest's checksum")
            return content

        return self._persist(name, attempt)

    def stream(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """The bytes [first, last) in pieces, resuming from the byte reached after a failure."""
        failures = 0
        while first < last:
            try:
                for piece in self._store.pieces(name, first=first, last=last):
                    first += len(piece)
                    yield piece
                if first < last:
                    raise OSError(f"it ended {last - first} bytes early")
            except _FINAL:
                raise
            except _TRANSIENT as error:
                self._store.close()
                self._pause(name, first, failures, error)
                failures += 1

    def forget(self, name: str, *, first: int, size: int) -> None:
        """Distrust what was read: a plain reader keeps nothing but open files."""
        self._store.close()

    def close(self) -> None:
        """Close all files."""
        self._store.close()

    def _persist(self, name: str, attempt: Callable[[], _T]) -> _T:
        failures = 0
        while True:
            try:
                return attempt()
            except _FINAL:
                raise
            except _TRANSIENT as error:
                self._pause(name, 0, failures, error)
                failures += 1

    def _pause(self, name: str, at: int, failures: int, error: Exception) -> None:
        if failures >= self._config.retries:
            raise OSError(
                f"{self.root}/{name}: reading stopped at byte {at} after {failures + 1} attempts: "
                f"{error or type(error).__name__}"
            ) from error
        # Jitter, so that a thousand ranks do not come back to a weak server in the same instant.
        time.sleep(min(0.2 * 2**failures, _LONGEST_PAUSE) * random.uniform(0.5, 1.0))


class LocalStore:
    """Files of a directory; those used last are kept open."""

    def __init__(self, root: str) -> None:
        self._root, self._most = root, descriptors.share()
        self._files: OrderedDict[str, int] = OrderedDict()

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        yield self.read(name, first, last - first)

    def read(self, name: str, first: int, size: int) -> bytes:
        return os.pread(self._file(name), size, first)

    def size(self, name: str) -> int:
        return os.stat(os.path.join(self._root, name)).st_size

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, name: str) -> int:
        if name not in self._files:
            if len(self._files) >= self._most:
                os.close(self._files.popitem(last=False)[1])
            self._files[name] = os.open(os.path.join(self._root, name), os.O_RDONLY)
        self._files.move_to_end(name)
        return self._files[name]


class _SameMethod(urllib.request.HTTPRedirectHandler):
    """Asks with HEAD again where HEAD was sent elsewhere: a GET would bring the whole file."""

    def redirect_request(self, request, *rest):  # type: ignore[no-untyped-def]
        moved = super().redirect_request(request, *rest)
        if moved is not None:
            moved.method = request.get_method()
        return moved


_OPENER = urllib.request.build_opener(_SameMethod)


class HttpStore:
    """Files below an http(s) URL, by range requests."""

    def __init__(self, root: str, timeout_s: float) -> None:
        self._root, self._timeout_s = root.rstrip("/"), timeout_s

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={first}-{last - 1}"}
        with self._open(name, method="GET", headers=headers) as response:
            if response.status != http.client.PARTIAL_CONTENT:
                raise ValueError(
                    f"{self._root} does not serve byte ranges; use a server that does, or "
                    "data.shards = 'pipe:curl -fsSL URL/{name}' with data.cache"
                )
            while piece := response.read(_PIECE):
                yield piece

    def size(self, name: str) -> int:
        with self._open(name, method="HEAD", headers={}) as response:
            length = response.headers["Content-Length"]
            if length is None:
                raise OSError("the server does not tell the size")
            return int(length)

    def close(self) -> None:
        """Nothing is kept open."""

    def _open(self, name: str, *, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        url = f"{self._root}/{urllib.parse.quote(name)}"
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            response = _OPENER.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"{url}: {error}") from None
            if error.code in (401, 403):
                raise PermissionError(f"{url}: {error}") from None
            raise
        assert isinstance(response, http.client.HTTPResponse)
        return response


class FsspecStore:
    """Files of any file system that fsspec knows: s3://, gs://, ..."""

    def __init__(self, root: str, timeout_s: float) -> None:
        from fsspec.asyn import sync  # its drivers are heavy; only such roots need them
        from fsspec.core import url_to_fs

        try:
            self._files, self._root = url_to_fs(root)
        except (ImportError, ValueError) as error:  # the driver is missing, or there is none
            raise ValueError(f"data.shards = {root}: {error}") from None
        self._sync, self._timeout_s = sync, timeout_s

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        while first < last:
            end = min(first + _RANGE, last)
            content = self._call("cat_file", f"{self._root}/{name}", start=first, end=end)
            yield content
            first += len(content)
            if len(content) < _RANGE:
                return

    def size(self, name: str) -> int:
        return int(self._call("info", f"{self._root}/{name}")["size"])

    def close(self) -> None:
        """Nothing is kept open."""

    def _call(self, what: str, path: str, **arguments: int) -> Any:
        """Most drivers wait without an end, and repeat for minutes; those that can be, are left."""
        with _as_oserror(path):
            if self._files.async_impl:
                call = getattr(self._files, f"_{what}")
                return self._sync(
                    self._files.loop, call, path, timeout=self._timeout_s, **arguments
                )
            return getattr(self._files, what)(path, **arguments)


@contextmanager
def _as_oserror(path: str) -> Iterator[None]:
    """The drivers of fsspec raise what their libraries do; all of it may be worth another try."""
    try:
        yield
    except _FINAL as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class PipeStore:
    """Output of a shell command with {name}, and ideally {first} and {last} (inclusive), in it."""

    def __init__(self, root: str, timeout_s: float) -> None:
        if "{name}" not in root:
            raise ValueError(f"data.shards = {root}: the command must contain {{name}}")
        self._root, self._timeout_s = root, timeout_s
        self.ranged = "{first}" in root and "{last}" in root

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        from webdataset.gopen import gopen  # imports torch: seconds that only pipes should cost

        command = self._root.removeprefix("pipe:").replace("{name}", shlex.quote(name))
        command = command.replace("{first}", str(first)).replace("{last}", str(last - 1))
        # In a session of its own, so that all of the command can be ended, not its shell alone.
        pipe = gopen(f"pipe:exec setsid sh -c {shlex.quote(command)}", "rb")
        at = first if self.ranged else 0
        try:
            while at < last and (piece := self._read(pipe.stream.fileno(), last - at)):
                if at + len(piece) > first:
                    yield piece[max(first - at, 0) :]
                at += len(piece)
        finally:
            pipe.stream.close()  # a command with more to say ends by SIGPIPE
            try:
                os.killpg(pipe.proc.pid, signal.SIGKILL)
            except ProcessLookupError:
                pipe.proc.kill()  # it is gone, or has no session yet
            status = pipe.proc.wait()
        if at < last and status:
            raise OSError(f"the command ended with exit status {status}")

    def size(self, name: str) -> None:
        return None

    def close(self) -> None:
        """Nothing is kept open."""

    def _read(self, descriptor: int, size: int) -> bytes:
        ready = select.poll()  # `select` fails for descriptors from 1024 on
        ready.register(descriptor, select.POLLIN)
        if not ready.poll(self._timeout_s * 1000):
            raise TimeoutError(f"the command wrote nothing for {self._timeout_s:g} s")
        return os.read(descriptor, min(size, _PIECE))


def is_local(root: str) -> bool:
    """Whether `root` is a directory of this machine."""
    return "://" not in root and not root.startswith("pipe:")


def _open_store(root: str, timeout_s: float) -> Store:
    if root.startswith("pipe:"):
        return PipeStore(root, timeout_s)
    if root.startswith(("http://", "https://")):
        return HttpStore(root, timeout_s)
    return LocalStore(root) if is_local(root) else FsspecStore(root, timeout_s)
