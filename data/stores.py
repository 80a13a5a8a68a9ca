"""Where a dataset's files are: a directory, an http(s) or fsspec URL, the output of a command.

A store makes one attempt to read a range of a file; `data.reader` adds retries. This is the only
module that imports webdataset, whose `gopen` runs the commands.
"""

import base64
import http.client
import os
import select
import shlex
import signal
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import IO, Any

from data import descriptors
from data.config import is_local, login_and_url, shown

_PIECE = 1 << 16
# Bytes of one read from a local file.
_LARGE = 1 << 26
# Bytes of one request to an fsspec driver, which must arrive within `timeout_s`.
_RANGE = 1 << 20

# Errors that another attempt does not change.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


class Store(ABC):
    """Files that can be read by ranges of bytes."""

    #: Whether a read from the middle of a file costs no more than that range.
    seekable = True

    @abstractmethod
    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """The bytes [first, last) of a file, in pieces as they arrive."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where that is unknown."""

    def close(self) -> None:  # noqa: B027 (most keep nothing open)
        """Close the files that are kept open, if any; a later read opens them again."""


class _Open:
    """An open file, closed only when no thread refers to it any more: others may be reading."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError):  # opening it failed
            os.close(self.number)


class LocalStore(Store):
    """Files of a directory, for any number of threads; the most recently used stay open.

    `sharers` is how many stores of this process share its limit of open files.
    """

    def __init__(self, root: str, *, sharers: int) -> None:
        self._root = root
        self._open = lru_cache(maxsize=max(descriptors.share() // sharers, 1))(_Open)

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """As `Store.pieces`; an image is one piece."""
        file = self._open(os.path.join(self._root, name))
        # In parts: a call reads 2 GiB at most, and needs memory for all that it reads.
        while first < last and (piece := os.pread(file.number, min(last - first, _LARGE), first)):
            yield piece
            first += len(piece)

    def size(self, name: str) -> int:
        """As `Store.size`."""
        return os.stat(os.path.join(self._root, name)).st_size

    def close(self) -> None:
        """Close all files."""
        self._open.cache_clear()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Repeats a redirected HEAD as HEAD: urllib would send GET and receive the whole file.

    The login is sent again to the same host and port only, as curl does.
    """

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        moved = super().redirect_request(req, fp, code, msg, headers, newurl)
        if moved is not None:
            moved.method = req.get_method()
            login = req.unredirected_hdrs.get("Authorization")
            if login and (moved.type, moved.host) == (req.type, req.host):
                moved.add_unredirected_header("Authorization", login)
        return moved


_OPENER = urllib.request.build_opener(_Redirects)


class HttpStore(Store):
    """Files below an http(s) URL, read by ranges, each with the query (a signature) of the URL."""

    def __init__(self, root: str, timeout_s: float) -> None:
        user, self._parts = login_and_url(root)
        self._timeout_s = timeout_s
        self._login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """As `Store.pieces`.

        Raises:
            ValueError: the server ignores ranges.
        """
        headers = {"Range": f"bytes={first}-{last - 1}"}
        with self._open(name, method="GET", headers=headers) as response:
            if response.status != http.client.PARTIAL_CONTENT:
                raise ValueError(
                    f"{shown(self._parts.geturl())} does not serve byte ranges; use a server that "
                    "does, or data.shards = 'pipe:curl -fsSL URL/{name}' with data.cache"
                )
            while piece := response.read(_PIECE):
                yield piece

    def size(self, name: str) -> int:
        """As `Store.size`."""
        with self._open(name, method="HEAD", headers={}) as response:
            length = response.headers["Content-Length"]
            if length is None:
                raise OSError("the server does not give the size")
            return int(length)

    def _open(self, name: str, *, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        path = f"{self._parts.path}/{urllib.parse.quote(name)}"
        url = self._parts._replace(path=path).geturl()
        request = urllib.request.Request(url, method=method, headers=headers)
        if self._login:  # see `_Redirects`
            request.add_unredirected_header("Authorization", f"Basic {self._login}")
        try:
            response = _OPENER.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"{shown(url)}: {error}") from None
            if error.code in (401, 403):
                raise PermissionError(f"{shown(url)}: {error}") from None
            raise
        assert isinstance(response, http.client.HTTPResponse)
        return response


class FsspecStore(Store):
    """Files of any file system for which fsspec has a driver: s3://, gs://, ..."""

    def __init__(self, root: str, timeout_s: float) -> None:
        from fsspec.asyn import sync  # slow to import, and only such roots need it
        from fsspec.core import url_to_fs

        try:
            self._files, self._root = url_to_fs(root)
        except (ImportError, ValueError) as error:  # the driver is not installed, or unknown
            raise ValueError(f"data.shards = {shown(root)}: {error}") from None
        self._sync, self._timeout_s = sync, timeout_s

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """As `Store.pieces`."""
        while first < last:
            end = min(first + _RANGE, last)
            content = self._call("cat_file", f"{self._root}/{name}", start=first, end=end)
            yield content
            first += len(content)
            if len(content) < _RANGE:
                return

    def size(self, name: str) -> int:
        """As `Store.size`."""
        return int(self._call("info", f"{self._root}/{name}")["size"])

    def _call(self, what: str, path: str, **arguments: int) -> Any:
        """Call the driver; with a time limit if it is asynchronous, since most have none.

        Raises:
            OSError: the driver raised any error.
        """
        try:
            if not self._files.async_impl:
                return getattr(self._files, what)(path, **arguments)
            call, timeout = getattr(self._files, f"_{what}"), self._timeout_s
            return self._sync(self._files.loop, call, path, timeout=timeout, **arguments)
        except FINAL as error:
            raise type(error)(f"{path}: {error}") from error
        except OSError:
            raise
        except Exception as error:  # of a driver's library: perhaps another attempt succeeds
            raise OSError(f"{type(error).__name__}: {error}") from error


class PipeStore(Store):
    """Output of a shell command that contains {name}, and ideally {first} and {last} (inclusive).

    Without the latter two, a read starts at the beginning of the file and drops what it skips.

    Raises:
        ValueError: the command does not contain {name}.
    """

    def __init__(self, root: str, timeout_s: float) -> None:
        if "{name}" not in root:
            raise ValueError(f"data.shards = {shown(root)}: the command must contain {{name}}")
        self._root, self._timeout_s = root, timeout_s
        self.seekable = "{first}" in root and "{last}" in root

    def pieces(self, name: str, *, first: int, last: int) -> Iterator[bytes]:
        """As `Store.pieces`."""
        from webdataset.gopen import gopen  # takes seconds, as it imports torch; only pipes need it

        command = self._root.removeprefix("pipe:").replace("{name}", shlex.quote(name))
        command = command.replace("{first}", str(first)).replace("{last}", str(last - 1))
        # A session of its own, so that killpg ends all processes of the command.
        pipe = gopen(f"pipe:exec setsid sh -c {shlex.quote(command)}", "rb")
        at = first if self.seekable else 0
        try:
            while at < last and (piece := self._read(pipe.stream.fileno(), last - at)):
                if at + len(piece) > first:
                    yield piece[max(first - at, 0) :]
                at += len(piece)
        finally:
            pipe.stream.close()  # a command with more to write ends by SIGPIPE
            try:
                os.killpg(pipe.proc.pid, signal.SIGKILL)
            except ProcessLookupError:
                pipe.proc.kill()  # it has ended, or has no session yet
            status = pipe.proc.wait()
        if at < last and status:
            raise OSError(f"the command ended with exit status {status}")

    def size(self, name: str) -> None:
        """As `Store.size`: unknown."""
        return None

    def _read(self, descriptor: int, size: int) -> bytes:
        ready = select.poll()  # `select` fails for descriptors from 1024 on
        ready.register(descriptor, select.POLLIN)
        if not ready.poll(self._timeout_s * 1000):
            raise TimeoutError(f"the command wrote nothing for {self._timeout_s:g} s")
        return os.read(descriptor, min(size, _PIECE))


def open_store(root: str, timeout_s: float, *, sharers: int) -> Store:
    """The store for `root`: a directory, an http(s) or fsspec URL, or `pipe:COMMAND`.

    `sharers` is as in `LocalStore`.

    Raises:
        ValueError: fsspec has no driver for the URL, or a command does not contain {name}.
    """
    if root.startswith("pipe:"):
        return PipeStore(root, timeout_s)
    if root.startswith(("http://", "https://")):
        return HttpStore(root, timeout_s)
    return LocalStore(root, sharers=sharers) if is_local(root) else FsspecStore(root, timeout_s)
