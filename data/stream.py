"""The stream: shard -> sample -> batch, endless and exact from any position.

This is what training reads. The position is the integer `images_seen`; all else follows from it,
the seed, the shards and the configuration, so that there is no loader state to save.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from weakref import WeakSet

import numpy as np

from data.batches import Batch, batch_of, to_device
from data.config import DataConfig, check, is_local
from data.dataset import unlisted
from data.manifest import MANIFEST
from data.mixture import Dataset, open_dataset
from data.order import share
from data.pool import cpus
from data.samples import BatchRequest, Samples, crop_remark
from data.workers import Filled, Setup, Workers

__all__ = ["Batch", "DataConfig", "Stream", "open_stream", "to_device"]

# With these variables OpenMP binds a process and its children to a CPU when torch is imported.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


class Stream:
    """Batches of a dataset, decoded ahead in worker processes.

    `bad` counts the images that were damaged and replaced in this process; `log` receives a line
    for each. Use it as a context manager, or call `close`, which ends the workers.

    Raises:
        ValueError: too few images, or shards packed for another image size.
    """

    def __init__(self, shards: Dataset, *, config: DataConfig, seed: int) -> None:
        self.config, self.shards, self.seed = config, shards, seed
        self.bad = 0
        self._samples = Samples(shards, config=config, seed=seed)
        self.log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self._running = WeakSet[Workers]()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> dict[str, int | str]:
        """What determines the order besides `images_seen`; runs save it, and check it on resume."""
        return {
            "seed": self.seed,
            "streams": self.config.streams,
            "block": self.config.block,
            "fingerprint": self.shards.fingerprint,
        }

    def check_identity(self, saved: dict[str, int | str]) -> None:
        """Raise ValueError, with what differs, if a run would continue in another order."""
        differing = [
            f"{name} was {saved.get(name)}, is {value}"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"data.shards = {self.shards.where}: the run began with other data "
                f"({'; '.join(differing)}); restore its shards and settings, or start another run"
            )

    def check_unchanged(self) -> None:
        """Raise ValueError if a directory has other shards now than when it was opened.

        Data that comes over a network is checked against the indexes that were read first.
        """
        for part in self.shards.parts:
            content = b""
            with suppress(OSError):  # open files stay readable where the directory is gone
                content = Path(part.root, MANIFEST).read_bytes() if is_local(part.root) else b""
            if content and part.fingerprint.encode() not in content:
                raise ValueError(
                    f"{part.where} has other shards now than when this start opened it: restore "
                    "those and rerun the same command, or start another run"
                )

    def batches(
        self,
        *,
        images_seen: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        pin: bool = False,
    ) -> Iterator[Batch]:
        """Endless micro-batches of one rank, from position `images_seen` on.

        With B = `batch_size`, step n takes the images [images_seen + n B, images_seen + (n + 1) B);
        this rank those with index mod ranks = rank, `micro_batch_size` at a time. `pin` puts them
        into page-locked memory.

        Raises:
            ValueError: `batch_size` is no multiple of ranks x micro_batch_size; damaged shards.
            OSError: shards cannot be read, or a worker died.
        """
        divides = batch_size % (ranks * micro_batch_size) == 0
        of = f"ranks x training.micro_batch = {ranks} x {micro_batch_size}"
        check(divides, "training.batch", batch_size, f"a multiple of {of}")
        requests = _training_requests(images_seen, batch_size, micro_batch_size, rank, ranks)
        return self._load(requests, micro_batch_size=micro_batch_size, pin=pin)

    def parts(
        self, *, images: int, size: int, rank: int, ranks: int, pin: bool = False
    ) -> Iterator[Batch]:
        """`images` images at equal distances, each once, without flips or random crops.

        They are divided into parts of `size`; rank r takes the parts r, r + ranks, ... So the
        content of a part does not depend on the number of ranks.

        Raises:
            ValueError: an image is damaged; and as `batches`.
        """
        step = self.shards.count // images
        parts = (
            BatchRequest(range(first * step, min(first + size, images) * step, step), once=True)
            for first in range(rank * size, images, ranks * size)
        )
        return self._load(parts, micro_batch_size=size, pin=pin)

    def require_room(self, images: int) -> None:
        """Raise ValueError, as `batches` does, if `data.prefetch_mb` is too small for a batch."""
        if self.config.workers:
            self._setup(images)

    def load(self, indices: range, *, once: bool = False) -> Batch:
        """Images of the training order, read in this process, without counting bad ones.

        With `once` they are images of the packing order, without flips or random crops.

        Raises:
            OSError, ValueError: as `batches`; with `once` as `parts`.
        """
        (filled,) = self._load_here(iter([BatchRequest(indices, once=once)]))
        return batch_of(filled, pin=False)

    def key(self, index: int) -> str:
        """The name of an image of the training order, as messages show it: shard and key."""
        return self._samples.key(index)

    def close(self) -> None:
        """End the workers and close all files."""
        for workers in self._running:
            workers.close()
        self._samples.close()

    def _load(
        self, requests: Iterator[BatchRequest], *, micro_batch_size: int, pin: bool
    ) -> Iterator[Batch]:
        if not self.config.workers:
            yield from self._count(self._load_here(requests), pin)
            return
        with closing(Workers(self._setup(micro_batch_size))) as workers:
            self._running.add(workers)
            yield from self._count(workers.load(requests), pin)

    def _setup(self, micro_batch_size: int) -> Setup:
        """The workers' setup, with as many slots (one micro-batch each) as prefetch_mb allows.

        At most eight for each worker: four for the requests that it has queued, the others for
        batches that wait or are in use.

        Raises:
            ValueError: not even one slot fits.
        """
        room = self.config.prefetch_mb * 2**20
        setup = Setup(self.shards, self.config, self.seed, images=micro_batch_size, slots=1)
        if setup.slot_bytes > room:
            enough = -(-2 * setup.slot_bytes // 2**20)
            raise ValueError(
                f"data.prefetch_mb = {self.config.prefetch_mb} holds no micro-batch of "
                f"{micro_batch_size} images; set it to {enough} or more, or take smaller ones"
            )
        return setup._replace(slots=min(room // setup.slot_bytes, 8 * self.config.workers))

    def _load_here(self, requests: Iterator[BatchRequest]) -> Iterator[Filled]:
        side = self.config.image_size
        for request in requests:
            images = np.empty((len(request.indices), side, side, 3), dtype=np.uint8)
            yield Filled(request, images, *self._samples.load(request, out=images))

    def _count(self, loaded: Iterator[Filled], pin: bool) -> Iterator[Batch]:
        """Make batches; count and log the bad samples."""
        for filled in loaded:
            self.bad += len(filled.bad)
            for line in filled.bad:
                self.log(f"bad sample replaced: {line}")
            yield batch_of(filled, pin=pin)
            del filled  # so that its slot is free while this waits for the next one


def open_stream(config: DataConfig, *, seed: int, check_files: bool = True) -> Stream:
    """The stream of the datasets that `config` names; errors as `open_dataset` and `Stream`."""
    shards = open_dataset(
        config.shards,
        mix=config.mix,
        shares=config.mix_shares,
        fetch=config,
        check_files=check_files,
    )
    return Stream(shards, config=config, seed=seed)


def data_remarks(shards: Dataset, *, held_out: Dataset | None, config: DataConfig) -> list[str]:
    """What the log says of the training images, and those of a validation, before a run begins."""
    parts = dict.fromkeys((*shards.parts, *(held_out.parts if held_out else ())))
    said = [crop_remark(shards, config=config), *map(unlisted, parts), cpu_remark(config.workers)]
    return [line for line in said if line]


def cpu_remark(workers: int) -> str | None:
    """A warning if this process and its workers are bound to too few of the CPUs, or None."""
    own, there = cpus(), os.cpu_count() or 1
    bound = [f"{name} = {os.environ[name]!r}" for name in _BINDING if os.environ.get(name)]
    if not workers or own == there or own > (workers if bound else 1):
        return None
    more = "raise cpus_per_task of Slurm, or a container's limit"
    if {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        more = f"give mpirun --bind-to none (Intel's: I_MPI_PIN=off), or {more}"
    way_out = f"unset {bound[0]}" if bound else more
    return f"data.workers = {workers}: all share {own} of {there} CPUs with this rank: {way_out}"


def _training_requests(
    images_seen: int, batch_size: int, micro_batch_size: int, rank: int, ranks: int
) -> Iterator[BatchRequest]:
    while True:
        mine = share(images_seen, batch_size=batch_size, rank=rank, ranks=ranks)
        for i in range(0, len(mine), micro_batch_size):
            yield BatchRequest(mine[i : i + micro_batch_size], once=False)
        images_seen += batch_size
