"""Decoding outside the trainer: processes that fill the slots of a block of shared memory.

A worker is a new Python process that imports this module alone, not a fork of the trainer: it has
no locks of the trainer's threads, no CUDA, and no torch. Trainer and worker exchange messages over
one socket, and pixels through anonymous shared memory. When either of them ends, the socket closes
and the other notices at once. Whichever is killed, no process and no memory is left behind.
"""

import mmap
import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import DataConfig
from data.mixture import Dataset
from data.order import Ints
from data.samples import BatchRequest, Samples
from data.transforms import Pixels

# Requests that a worker has queued, so that it never waits for the next one.
_QUEUED = 4


class Setup(NamedTuple):
    """What a worker needs at its start; a slot holds `images` images and labels."""

    shards: Dataset
    config: DataConfig
    seed: int
    images: int
    slots: int

    @property
    def slot_bytes(self) -> int:
        """Size of a slot: a label of 8 bytes and the pixels of each image."""
        return self.images * (3 * self.config.image_size**2 + 8)


class Filled(NamedTuple):
    """A finished request: images uint8 (n, H, W, 3), labels int64 (n,), a line per bad sample.

    The images may lie in a slot, which is not used again while the array exists.
    """

    request: BatchRequest
    images: Pixels
    labels: Ints
    bad: tuple[str, ...]


class Workers:
    """Processes that load requests ahead, in order; `close` ends them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        memory = _shared_memory(setup.slots * setup.slot_bytes)
        self._slots = _map_slots(memory, setup)
        count = min(setup.config.workers, setup.slots)
        self._processes, self._sockets = zip(
            *(_start(setup, memory) for _ in range(count)), strict=True
        )
        os.close(memory)  # the mappings keep it

    def load(self, requests: Iterator[BatchRequest]) -> Iterator[Filled]:
        """Load requests in their order, as many ahead as there are slots.

        Raises:
            whatever `Samples.load` raised in a worker; ChildProcessError if a worker died.
        """
        free = deque(range(self._setup.slots))
        pending: deque[tuple[BatchRequest, int]] = deque()
        bad: dict[int, tuple[str, ...]] = {}
        busy = [0] * len(self._sockets)
        while True:
            while free and min(busy) < _QUEUED and (request := next(requests, None)):
                slot, worker = free.popleft(), busy.index(min(busy))
                self._send(worker, (slot, request))
                pending.append((request, slot))
                busy[worker] += 1
            if not pending:
                return
            if pending[0][1] in bad:
                request, slot = pending.popleft()
                # The caller gets the slot itself while there are others for all workers, and else
                # a copy: a caller that keeps many batches must not stop the workers.
                share = len(free) + len(pending) >= len(self._sockets)
                yield self._hand_out(request, slot, bad.pop(slot), free, share)
                continue
            for socket in wait(self._sockets):
                worker = self._sockets.index(socket)
                slot, answer = self._receive(worker)
                bad[slot] = answer
                busy[worker] -= 1

    def close(self) -> None:
        """Kill the processes: they hold nothing that could be lost."""
        for socket in self._sockets:
            socket.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def _hand_out(
        self, request: BatchRequest, slot: int, bad: tuple[str, ...], free: deque[int], share: bool
    ) -> Filled:
        """The images of a slot: the slot itself with `share`, otherwise a copy of it."""
        images, labels = self._slots[slot]
        images = images[: len(request.indices)]
        if share:
            # A tensor made from this array keeps it alive; the slot is free when both are gone.
            weakref.finalize(images, free.append, slot)
        else:
            images = images.copy()
            free.append(slot)
        return Filled(request, images, labels[: len(request.indices)].copy(), bad)

    def _send(self, worker: int, message: tuple[int, BatchRequest]) -> None:
        try:
            self._sockets[worker].send(message)
        except OSError:
            raise self._death(worker) from None

    def _receive(self, worker: int) -> tuple[int, tuple[str, ...]]:
        try:
            slot, answer = self._sockets[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        if isinstance(answer, BaseException):
            raise answer
        return slot, answer

    def _death(self, worker: int) -> ChildProcessError:
        process = self._processes[worker]
        return ChildProcessError(
            f"data worker {worker} (process {process.pid}) died with exit status {process.wait()}; "
            "if it was killed (-9), the machine may be out of memory: lower data.workers or "
            "data.prefetch_mb. Rerun the same command to resume"
        )


def serve(socket: Connection, memory: int) -> None:
    """Run a worker: load what is requested until the trainer has ended."""
    # The trainer decides when to stop; a signal to the whole job must not end its workers first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    setup: Setup = socket.recv()
    samples = Samples(setup.shards, config=setup.config, seed=setup.seed)
    slots = _map_slots(memory, setup)
    trainer = os.getppid()
    while True:
        # When the trainer ends, its end of the socket stays open if another child inherited it.
        while not socket.poll(5):
            if os.getppid() != trainer:
                return
        slot, request = socket.recv()
        socket.send((slot, _answer(samples, request, slots[slot])))


def _answer(
    samples: Samples, request: BatchRequest, slot: tuple[Pixels, Ints]
) -> tuple[str, ...] | Exception:
    images, labels = slot
    n = len(request.indices)
    try:
        loaded = samples.load(request, out=images[:n])
    except (ValueError, OSError) as error:
        return error
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
    labels[:n] = loaded.labels
    return loaded.bad


def _start(setup: Setup, memory: int) -> tuple["subprocess.Popen[bytes]", Connection]:
    ours, theirs = Pipe()
    # One thread each: the parallelism is the processes.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "data.workers", str(theirs.fileno()), str(memory)],
        pass_fds=(theirs.fileno(), memory),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to the trainer only
        env={**os.environ, **threads, "PYTHONPATH": path.rstrip(os.pathsep)},
    )
    theirs.close()
    ours.send(setup)
    return process, ours


def _shared_memory(size: int) -> int:
    """A descriptor of anonymous memory, which is freed when the last process that uses it ends."""
    memory = os.memfd_create("images")
    os.ftruncate(memory, size)
    return memory


def _map_slots(memory: int, setup: Setup) -> list[tuple[Pixels, Ints]]:
    side, n = setup.config.image_size, setup.images
    buffer = mmap.mmap(memory, setup.slots * setup.slot_bytes)
    slots = []
    for begin in range(0, len(buffer), setup.slot_bytes):
        labels = np.frombuffer(buffer, dtype=np.int64, count=n, offset=begin)
        images = np.frombuffer(buffer, np.uint8, count=n * 3 * side**2, offset=begin + 8 * n)
        slots.append((images.reshape(n, side, side, 3), labels))
    return slots


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    except (EOFError, ConnectionError):
        sys.exit(0)  # the trainer has ended
