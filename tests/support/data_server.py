"""A real http server of a directory that answers byte ranges, and misbehaves as it is told."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = str | None
"""None, "503", "stall" (until the server ends), "reset", "short" or "no ranges"."""


@contextmanager
def serving(
    root: Path,
    *,
    fault: Callable[[int, str], Fault] = lambda n, path: None,
    seen: list[Message] | None = None,
    query: str = "",
) -> Iterator[str]:
    """Serve `root` at the URL given; `fault(n, path)` decides about the n-th GET of a tar.

    `seen` receives the headers of every request. Those without this `query` are forbidden.
    """
    server = _Server(root, fault, query)
    server.seen = [] if seen is None else seen
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.ends.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    seen: list[Message]
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, root: Path, fault: Callable[[int, str], Fault], query: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.query, self.ends = root, query, threading.Event()
        self._fault, self._count, self._lock = fault, 0, threading.Lock()

    def fault_of(self, path: str) -> Fault:
        """What goes wrong with this GET."""
        if not path.endswith(".tar"):
            return None
        with self._lock:
            self._count += 1
            return self._fault(self._count - 1, path)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self._file()
        if path:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()

    def do_GET(self) -> None:
        path = self._file()
        if not path:
            return
        fault = self.server.fault_of(self.path)
        if fault == "503":
            self.send_error(503)
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = path.read_bytes()[first : last + 1]
        self.send_response(200 if fault == "no ranges" else 206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(body, fault)

    def _file(self) -> Path | None:
        """The file that is asked for. What is below /moved/ is elsewhere now, /away/ elsewhere on
        another host.
        """
        self.server.seen.append(self.headers)
        asked, _, query = self.path.partition("?")
        path = self.server.root / unquote(asked).lstrip("/")
        if query != self.server.query:
            self.send_error(403)
        elif self.path.startswith(("/moved/", "/away/")):
            self.send_response(302)
            _, place, rest = self.path.split("/", 2)
            other = f"http://localhost:{self.server.server_address[1]}"
            self.send_header("Location", f"{other if place == 'away' else ''}/{rest}")
            self.end_headers()
        elif path.is_file():
            return path
        else:
            self.send_error(404)
        return None

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        if fault == "stall":
            self.server.ends.wait()
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
