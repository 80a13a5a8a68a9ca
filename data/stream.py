"""The stream: shard -> sample -> batch, endless and exact from any position.

What training asks for. The position is the integer `images`; everything else follows from it, the
seed, the shards and the configuration, so there is no loader state to save.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from data.samples import DataConfig, Request, Samples
from data.shards import Shards
from data.workers import Filled, Setup, Workers

__all__ = ["Batch", "DataConfig", "Stream", "to_device"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: images uint8 (B, 3, H, W), labels int64 (B,), image numbers int64 (B,).

    The images lie as they were decoded, with the channels last, until `to_device` turns them.

    `bad` of the images were damaged, and others stand in for them.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    bad: int = 0


class Stream:
    """Batches of a dataset, decoded ahead in worker processes.

    `served` and `bad` count this process's images and, among them, those that were damaged and
    replaced; `log` receives a line for each of the latter. Use as a context manager, or close it:
    that ends the workers.

    Raises:
        ValueError: too few images, or shards packed for another image size.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        config: DataConfig,
        seed: int,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.shards, self.seed = config, shards, seed
        self.served = self.bad = 0
        self._samples = Samples(shards, config=config, seed=seed)
        self.log = log or _to_stderr
        self._running: list[Workers] = []

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def identity(self) -> dict[str, int | str]:
        """What fixes the order besides `images`: save it, and `check_identity` on resume."""
        return {
            "seed": self.seed,
            "streams": self.config.streams,
            "block": self.config.block,
            "fingerprint": self.shards.fingerprint,
        }

    def check_identity(self, saved: dict[str, int | str]) -> None:
        """Refuse to continue a run in another order than it began.

        Raises:
            ValueError: naming each entry that differs.
        """
        differing = [
            f"{name} was {saved.get(name)}, is {value}"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the run began with other data ({'; '.join(differing)}): give it the shards "
                f"and settings it began with, not {self.shards.root}, or start another run"
            )

    def batches(
        self, *, images: int, batch: int, micro_batch: int, rank: int, ranks: int, pin: bool = False
    ) -> Iterator[Batch]:
        """Endless micro-batches of one rank from position `images` on.

        Step n takes the images [images + n batch, images + (n + 1) batch); this rank those with
        number mod ranks = rank, `micro_batch` at a time. `pin` puts them into page-locked memory.

        Raises:
            ValueError: `batch` is no multiple of ranks x micro_batch; damaged shards.
            OSError: shards cannot be read.
            RuntimeError: a worker died.
        """
        if batch % (ranks * micro_batch):
            raise ValueError(
                f"batch = {batch} is no multiple of ranks x micro_batch = {ranks} x {micro_batch}; "
                "change one of them"
            )
        requests = _training_requests(images, batch, micro_batch, rank, ranks)
        return self._load(requests, micro_batch=micro_batch, pin=pin)

    def once(
        self, *, micro_batch: int, rank: int, ranks: int, pin: bool = False
    ) -> Iterator[Batch]:
        """Each image of the split once, in packing order, without flips or random crops.

        Rank r takes images r, r + ranks, ... All ranks get equally many micro-batches, as
        collectives need; the last ones may be short or empty.

        Raises:
            ValueError: an image is damaged; and as `batches`.
        """
        requests = _single_pass(self.shards.count, micro_batch, rank, ranks)
        return self._load(requests, micro_batch=micro_batch, pin=pin)

    def close(self) -> None:
        """End the workers and close all files."""
        for workers in self._running:
            workers.close()
        self._running.clear()
        self._samples.close()

    def _load(self, requests: Iterator[Request], *, micro_batch: int, pin: bool) -> Iterator[Batch]:
        if not self.config.workers:
            yield from self._count(self._load_here(requests, micro_batch), pin)
            return
        workers = Workers(self._setup(micro_batch))
        self._running.append(workers)
        try:
            with closing(workers):
                yield from self._count(workers.load(requests), pin)
        finally:
            if workers in self._running:
                self._running.remove(workers)

    def _setup(self, micro_batch: int) -> Setup:
        room = self.config.prefetch_mb * 2**20
        setup = Setup(self.shards, self.config, self.seed, images=micro_batch, slots=1)
        if setup.slot_bytes > room:
            raise ValueError(
                f"data.prefetch_mb = {self.config.prefetch_mb} holds no micro-batch of "
                f"{micro_batch} images; set it to {-(-2 * setup.slot_bytes // 2**20)} or more"
            )
        return setup._replace(slots=min(room // setup.slot_bytes, 8 * self.config.workers))

    def _load_here(self, requests: Iterator[Request], micro_batch: int) -> Iterator[Filled]:
        side = self.config.image_size
        for request in requests:
            images = np.empty((len(request.numbers), side, side, 3), dtype=np.uint8)
            yield Filled(request, images, *self._samples.load(request, out=images))

    def _count(self, loaded: Iterator[Filled], pin: bool) -> Iterator[Batch]:
        """Count, tell of what was bad, and make batches."""
        for filled in loaded:
            self.served += len(filled.labels)
            self.bad += len(filled.bad)
            for line in filled.bad:
                self.log(f"bad sample replaced: {line}")
            yield Batch(
                images=_tensor(filled.images, pin).permute(0, 3, 1, 2),
                labels=_tensor(filled.labels, pin),
                numbers=torch.tensor(filled.request.numbers, dtype=torch.int64),
                bad=len(filled.bad),
            )
            del filled  # its slot shall be free again before the next one is waited for


def to_device(batches: Iterator[Batch], *, device: torch.device) -> Iterator[Batch]:
    """Move batches to where the network is; to a GPU beside the computation that runs there.

    The batches should be pinned; each is asked for only when it is needed.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(side):
            tensors = [
                tensor.to(device, non_blocking=True).contiguous()
                for tensor in (batch.images, batch.labels, batch.numbers)
            ]
        if side:
            compute = torch.cuda.current_stream(device)
            compute.wait_stream(side)
            for tensor in tensors:
                tensor.record_stream(compute)
        yield Batch(images=tensors[0], labels=tensors[1], numbers=tensors[2], bad=batch.bad)


def _training_requests(
    images: int, batch: int, micro_batch: int, rank: int, ranks: int
) -> Iterator[Request]:
    while True:
        mine = range(images + (rank - images) % ranks, images + batch, ranks)
        for i in range(0, len(mine), micro_batch):
            yield Request(mine[i : i + micro_batch], once=False)
        images += batch


def _single_pass(count: int, micro_batch: int, rank: int, ranks: int) -> Iterator[Request]:
    mine = range(rank, count, ranks)
    for i in range(0, -(-count // ranks), micro_batch):
        yield Request(mine[i : i + micro_batch], once=True)


def _tensor(array: np.ndarray, pin: bool) -> Tensor:
    source = torch.from_numpy(array)
    if not pin:
        return source
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    # numpy copies in this thread; torch would wake a team that then spins on the workers' cores.
    np.copyto(copy.numpy(), array)
    return copy


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
