"""Connections that firewalls do not forget while they are idle, as between two checkpoints.

What tracks connections, such as a cloud's security groups, forgets one through which nothing has
passed for some minutes, and drops all that is sent through it from then on. Neither gloo, nor NCCL,
nor torch's store asks the kernel to send anything meanwhile; so this asks for all of them.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Seconds between two looks for new connections, and of idleness until the kernel probes one.
_EVERY, _IDLE = 30.0, 30
# Probes without an answer until a connection has failed: after as long as by data without one.
_PROBES = 30


@contextmanager
def kept_alive() -> Iterator[None]:
    """While entered, the kernel probes idle connections of this process, those made later too."""
    done = threading.Event()
    thread = threading.Thread(target=_keep_all, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _keep_all(done: threading.Event) -> None:
    known: set[str] = set()
    while True:
        known = _keep_new(known)
        if done.wait(_EVERY):
            return


def _keep_new(known: set[str]) -> set[str]:
    """Have the kernel probe all connections but the `known` ones; returns all sockets."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            found[os.readlink(f"/proc/self/fd/{number}")] = int(number)
    sockets = {link for link in found if link.startswith("socket:")}
    for link in sockets - known:
        # The copy is of the same connection, and another thread may close the original.
        with suppress(OSError), socket.socket(fileno=os.dup(found[link])) as connection:
            _keep(connection)
    return sockets


def _keep(connection: socket.socket) -> None:
    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
    if internet and connection.type == socket.SOCK_STREAM:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
