"""Messages of the ranks to each other through the process group's own store, signed.

The store listens on the network and lets anybody write. So every message carries a code that only
who knows the run's secret can make; the secret goes through the process group itself.
"""

import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from trainer.ranks.ending import NETWORK
from trainer.ranks.group import from_main


class Mailbox:
    """A place for one message under each name. All ranks must make it together."""

    def __init__(self) -> None:
        # A connection of its own: a thread that waits in the store, as one does while ranks form a
        # group, keeps that of the process group from all others.
        own = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._store: dist.Store = dist.PrefixStore("watch", own)
        self._secret: bytes = from_main(lambda: secrets.token_bytes(16))

    def put(self, name: str, message: Any) -> None:
        """Post a message, plain JSON, in place of the one before."""
        body = json.dumps(message)
        self._store.set(name, f"{self._code(name, body)} {body}")

    def get(self, names: Sequence[str]) -> list[Any]:
        """The messages under these names; None where there is none, or one by somebody else."""
        if not self._store.check(list(names)):  # to read what is not there would wait for it
            return [None] * len(names)
        found = self._store.multi_get(list(names))
        return [self._read(name, raw) for name, raw in zip(names, found, strict=True)]

    def _read(self, name: str, raw: bytes) -> Any:
        try:
            code, _, body = raw.decode().partition(" ")
            return json.loads(body) if hmac.compare_digest(code, self._code(name, body)) else None
        except (ValueError, TypeError):
            return None

    def _code(self, name: str, body: str) -> str:
        return hmac.new(self._secret, f"{name} {body}".encode(), hashlib.sha256).hexdigest()


def briefly(act: Callable[[], None]) -> None:
    """Do what may block, for 2 seconds at most; or fail, where the store has ended."""

    def attempt() -> None:
        with suppress(RuntimeError):
            act()

    thread = threading.Thread(target=attempt, daemon=True, name=f"{NETWORK}briefly")
    thread.start()
    thread.join(2.0)
