"""A rank that is lost or hangs ends the job, and is named.

Neither Slurm nor mpirun always notices a machine that no longer answers, and a rank that waits in a
collective waits long. So a thread of every rank reports its progress to the main rank each second,
through a store of its own. The main rank decides: a rank without reports is lost; when no rank
makes progress, those that are furthest behind hang. The other ranks watch the main rank alone. The
thread that decides uses its own clock and never waits for the network.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType

import torch.distributed as dist

from data.exits import FAILED
from trainer.ranks.group import from_main
from trainer.ranks.world import World

_BEAT = 1.0
# What the main rank has found; empty while all is well.
_VERDICT = "verdict"


@dataclass
class _Rank:
    """What is known of a rank, and when it was last heard from and last came further."""

    host: str = "?"
    doing: str = "?"
    beat: int = -1
    marks: int = -1
    heard: float = 0.0

    def hear(self, message: bytes, *, now: float) -> bool:
        """Take in a report; whether the rank has made progress."""
        beat, marks, self.host, self.doing = json.loads(message)
        if beat != self.beat:
            self.beat, self.heard = beat, now
        further, self.marks = marks != self.marks, marks
        return further


class Watchdog:
    """Watches the ranks while entered. All ranks enter, and leave, together.

    `mark` says what the rank does next. When a rank is lost, or none makes progress, for `patience`
    seconds, every rank's process ends with status 1 and `tell` receives what happened; before that,
    `dump` writes where this rank stands.
    """

    def __init__(self, world: World, *, patience: float) -> None:
        self._world = world
        self._patience = patience
        self._doing, self._marks, self._beats = "starting", 0, 0
        self._host = socket.gethostname()
        self._done = threading.Event()
        self._heard = [_Rank() for _ in range(world.size if world.is_main else 1)]
        self._moved = 0.0
        self._verdict = ""
        self._threads: list[threading.Thread] = []
        self.tell: Callable[[str], None] = lambda _: None
        self.dump: Callable[[], None] = lambda: None

    def mark(self, doing: str) -> None:
        """This rank has made progress, and now does `doing`."""
        self._doing, self._marks = doing, self._marks + 1

    def __enter__(self) -> "Watchdog":
        self._store = _meet(self._world, patience=self._patience)
        if self._world.is_main:
            self._store.set(_VERDICT, "")
        self._say_alive()
        dist.barrier()
        self._moved = time.monotonic()
        for rank in self._heard:
            rank.heard = self._moved
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RuntimeError):  # a collective failed: a peer may be gone
            self._name_the_gone()
        if error is None:
            dist.barrier()
        self._done.set()
        for thread in self._threads:
            # Python aborts a process (status 134, not 78) whose daemon thread is in C++ at its end.
            thread.join(None if error is None else 5 * _BEAT)
        if error is None:
            dist.barrier()  # no rank may still read the store when the main rank closes it

    def _say_alive(self) -> None:
        self._beats += 1
        message = json.dumps([self._beats, self._marks, self._host, self._doing])
        self._store.set(f"rank {self._world.rank}", message)

    def _talk(self) -> None:
        """Report and listen. The network may block this thread forever."""
        keys = [f"rank {rank}" for rank in range(len(self._heard))]
        try:
            while not self._done.wait(_BEAT):
                self._say_alive()
                *messages, verdict = self._store.multi_get([*keys, _VERDICT])
                self._listen(messages)
                self._verdict = self._verdict or verdict.decode()
        except RuntimeError:
            return  # `_judge` notices that reports are missing

    def _listen(self, messages: Sequence[bytes]) -> None:
        now = time.monotonic()
        further = [r.hear(m, now=now) for r, m in zip(self._heard, messages, strict=True)]
        if any(further):
            self._moved = now

    def _judge(self) -> None:
        while not self._done.wait(_BEAT):
            self._verdict = self._verdict or self._find()
            if self._verdict and not self._done.is_set():
                self._end()

    def _find(self) -> str:
        """What is wrong, or nothing."""
        now = time.monotonic()
        silent = [now - rank.heard for rank in self._heard]
        if max(silent) > self._patience:
            # Ranks lost together may have sent their last reports some beats apart.
            lost = [n for n, s in enumerate(silent) if s > self._patience - 4 * _BEAT]
            return f"lost: {self._named(lost)}: not heard from for {self._patience:g} s"
        if self._world.is_main and now - self._moved > self._patience:
            least = min(rank.marks for rank in self._heard)
            behind = [n for n, rank in enumerate(self._heard) if rank.marks == least]
            return f"hung: {self._named(behind)}: no rank made progress for {self._patience:g} s"
        return ""

    def _named(self, ranks: Sequence[int]) -> str:
        """Such as "n2 (ranks 2, 3; computing)", host by host."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self._heard[rank].host, []).append(rank)
        return ", ".join(
            f"{host} (rank{'s' * (len(own) > 1)} {', '.join(map(str, own))}; "
            f"{self._heard[own[0]].doing})"
            for host, own in hosts.items()
        )

    def _end(self) -> None:
        """Print the verdict once on each host, log it from the first two hosts, and exit.

        The network may be cut between the hosts.
        """
        if self._world.local_rank == 0:
            print(f"{self._host}: {self._verdict}", file=sys.stderr, flush=True)
        self._within(2.0, self.dump)
        if self._world.rank in (0, self._world.local_size):
            self._within(2.0, lambda: self.tell(f"{self._host}: {self._verdict}"))
        if self._world.is_main:
            self._within(2.0, lambda: self._store.set(_VERDICT, self._verdict))
            time.sleep(4 * _BEAT)  # the store ends with this process; let the others read it
        os._exit(FAILED)

    @staticmethod
    def _within(seconds: float, act: Callable[[], None]) -> None:
        """Do what may block, for so long at most."""
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(seconds)

    def _name_the_gone(self) -> None:
        """Name the ranks that have ended, before the error is printed."""
        time.sleep(5 * _BEAT)
        silent = time.monotonic() - 4 * _BEAT
        gone = [n for n, rank in enumerate(self._heard) if rank.heard < silent]
        if gone and self._world.local_rank == 0:
            what = f"{self._host}: lost: {self._named(gone)}"
            print(what, file=sys.stderr, flush=True)
            self._within(2.0, lambda: self.tell(what))


def _meet(world: World, *, patience: float) -> dist.TCPStore:
    """A store on the main rank's host that all ranks reach."""
    store = partial(dist.TCPStore, world.address, timeout=timedelta(seconds=patience))
    own = store(0, is_master=True, wait_for_workers=False) if world.is_main else None
    port = from_main(lambda: 0 if own is None else own.port)
    return own or store(port, is_master=False)


def named_hosts(verdict: str) -> list[str]:
    """The hosts whose ranks a verdict names, such as n2 in "n1: lost: n2 (rank 3; computing)"."""
    return re.findall(r"(\S+) \(ranks? \d", verdict)
