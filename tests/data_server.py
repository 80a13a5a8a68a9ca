"""A real http server of a directory that answers byte ranges, and misbehaves as it is told."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str | None
"""None, "503", "stall" (until the server ends), "reset", "short" or "no ranges"."""


@contextmanager
def serving(root: Path, *, fault: Callable[[int, str], Fault]) -> Iterator[str]:
    """Serve `root` at the URL given; `fault(n, path)` decides about the n-th GET of a tar."""
    counter = iter(range(10**9))
    lock, ends = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if self._moved():
                return
            path = root / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()

        def do_GET(self) -> None:
            if self._moved():
                return
            path = root / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            with lock:
                what = fault(next(counter), self.path) if path.suffix == ".tar" else None
            if what == "503":
                return self.send_error(503)
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = path.read_bytes()[first : last + 1]
            self.send_response(200 if what == "no ranges" else 206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self._send(body, what)

        def _moved(self) -> bool:
            """What is asked for below /moved/ is elsewhere now."""
            if not self.path.startswith("/moved/"):
                return False
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return True

        def _send(self, body: bytes, what: Fault) -> None:
            if what is None:
                self.wfile.write(body)
                return
            self.wfile.write(body[: len(body) // 2])
            if what == "stall":
                ends.wait()
            elif what == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ends.set()
        server.shutdown()
        server.server_close()
        thread.join()
