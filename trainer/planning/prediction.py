"""Predictions from counted costs and stated rates: the time of a step, and what fits in memory."""

import bisect
import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data import files
from trainer.adm.config import check
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine.averages import kept
from trainer.planning import costs
from trainer.planning.costs import NetCosts
from trainer.run import checkpoint as checkpoints
from trainer.run import history
from trainer.run.runstate import committed

GIB, GB = 2**30, 1e9
# A backward pass takes twice the operations of the forward pass; recomputation one pass more.
_PASSES, _RECOMPUTED = 3, 4
_RATE = "images_per_second"
# Rows of a run's metrics that its speed is taken from.
_ROWS = 50


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The sizes and rates that a plan assumes; each is an option of `trainer.plan`."""

    gpus: int
    #: GiB of a GPU, and how much of them CUDA, NCCL and fragmentation take.
    gpu_memory: float
    reserve: float
    #: Peak of a GPU in TFLOP/s, and the share of it that forward and backward passes reach.
    tflops: float
    mfu: float
    #: GB/s that each rank sends in collectives, and the largest share of the reductions' time
    #: that the backward pass hides.
    bandwidth: float
    overlap: float
    #: Microseconds that a message takes from a rank to the next.
    latency: float
    #: Milliseconds that the host needs to launch the work of a micro-batch.
    host_ms: float

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "tflops", "bandwidth"):
            value = getattr(self, name)
            check(
                0 < value < math.inf,
                f"--{name.replace('_', '-')}",
                value,
                "a finite number above 0",
            )
        check(0 < self.mfu <= 1, "--mfu", self.mfu, "above 0, at most 1")
        check(0 <= self.overlap <= 1, "--overlap", self.overlap, "from 0 to 1")
        for name in ("host_ms", "latency"):
            value = getattr(self, name)
            finite = "a finite number from 0"
            check(0 <= value < math.inf, f"--{name.replace('_', '-')}", value, finite)
        below = f"from 0 to below --gpu-memory = {self.gpu_memory:g}"
        check(0 <= self.reserve < self.gpu_memory, "--reserve", self.reserve, below)

    @property
    def memory_room(self) -> float:
        """Bytes of a GPU that training may take."""
        return (self.gpu_memory - self.reserve) * GIB


@dataclass(frozen=True, kw_only=True)
class Step:
    """The predicted seconds of one optimizer step, by what they are spent on."""

    gpus: int
    batch: int
    micro_batch: int
    compute: float
    #: Communication that no computation hides.
    communication: float
    #: What launching kernels takes longer than the kernels.
    host: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.communication + self.host

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPU computes at the assumed rate."""
        return self.compute / self.seconds

    @property
    def limit(self) -> str:
        """What limits the step: "computing", or what most of the other time goes to."""
        if self.efficiency >= 0.9:
            return "computing"
        return "network" if self.communication > self.host else "host: few images per GPU"


def _passes(config: Config) -> int:
    return _RECOMPUTED if config.model.checkpoint else _PASSES


def operations(config: Config) -> int:
    """Floating-point operations of one image in training."""
    return _passes(config) * costs.count(config).forward_flops


def step(config: Config, *, machine: Machine, gpus: int, zero: Mapping[str, Any]) -> Step:
    """Predict the step of a config on so many GPUs; `zero` is ds_config's zero_optimization.

    Raises:
        ValueError: the batch does not divide among them.
    """
    training, net = config.training, costs.count(config)
    micro = training.micro_batch_on(gpus)
    pieces = training.batch // (gpus * micro)
    passes = _passes(config)
    rate = machine.mfu * machine.tflops * 1e12
    compute = training.batch / gpus * passes * net.forward_flops / rate
    gather, reduce = _collectives(net, machine=machine, gpus=gpus, zero=zero, pieces=pieces)
    # In stage 1 the backward pass of the last micro-batch alone hides reductions.
    backward = compute * (passes - 1) / passes / (pieces if zero["stage"] == 1 else 1)
    compiled = config.training.compile and zero["stage"] != 3
    ended = _reduced(net, zero=zero, compiled=compiled, reduce=reduce, backward=backward)
    exposed = max(ended - backward, reduce * (1 - machine.overlap)) if overlaps(zero) else reduce
    if zero["stage"] == 3:  # gathers its weights ahead of the layers that need them
        exposed += gather - min(gather * machine.overlap, compute)
    else:
        exposed += gather
    host = max(0.0, pieces * machine.host_ms / 1000 - compute)
    return Step(
        gpus=gpus,
        batch=training.batch,
        micro_batch=micro,
        compute=compute,
        communication=exposed,
        host=host,
    )


def overlaps(zero: Mapping[str, Any]) -> bool:
    """Whether gradients are reduced while a backward pass computes others."""
    return bool(zero.get("overlap_comm", zero["stage"] == 3))


def _reduced(
    net: NetCosts, *, zero: Mapping[str, Any], compiled: bool, reduce: float, backward: float
) -> float:
    """Seconds from the start of a backward pass to the end of the reductions that overlap with it.

    `backward` and `reduce` are the seconds of each alone. A bucket is reduced once its last
    gradient is computed, and a compiled part gives all of its gradients at its end.
    """
    filled = [size / net.parameters for size in costs.buckets(net, zero=zero)]
    steps = reversed(net.parts) if compiled else [(share, share) for share in filled]
    computed, there = (list(accumulate(shares)) for shares in zip(*steps, strict=True))
    ended = 0.0
    for share, least in zip(filled, accumulate(filled), strict=True):
        at = min(bisect.bisect_left(there, least - 1e-9), len(there) - 1)
        ended = max(ended, backward * computed[at]) + reduce * share
    return ended


def _collectives(
    net: NetCosts, *, machine: Machine, gpus: int, zero: Mapping[str, Any], pieces: int
) -> tuple[float, float]:
    """Seconds that a step's gathers, and its reductions, take on the network.

    All-reduces pass a tree up and down; the other collectives pass a ring of all ranks.
    """
    moved = costs.collectives(net, zero=zero, ranks=gpus, accumulation=pieces)
    seconds = {"all_gather": 0.0}
    for name, (size, calls) in moved.items():
        twice = name == "all_reduce"
        hops = 2 * math.ceil(math.log2(gpus)) if twice else gpus - 1
        sent = (2 if twice else 1) * size * (gpus - 1) / gpus
        seconds[name] = sent / (machine.bandwidth * GB) + calls * hops * machine.latency / 1e6
    return seconds.pop("all_gather"), sum(seconds.values())


def scaled(
    config: Config, *, machine: Machine, zero: Mapping[str, Any], batches: Mapping[int, int]
) -> dict[int, Step | None]:
    """The step on each number of GPUs, of `batches`, in the largest micro-batches that fit.

    None where not even one image fits.
    """
    found: dict[int, Step | None] = {}
    for gpus, batch in batches.items():
        sized = resized(config, batch=batch, micro_batch=max(batch // gpus, 1))
        micro = largest_micro_batch(sized, zero=zero, ranks=gpus, room=machine.memory_room)
        found[gpus] = None
        if micro:
            sized = resized(config, batch=batch, micro_batch=micro)
            found[gpus] = step(sized, machine=machine, gpus=gpus, zero=zero)
    return found


def resized(config: Config, *, batch: int, micro_batch: int) -> Config:
    """The config with another batch; its images are cut to whole batches."""
    images = max(config.training.images // batch, 1) * batch
    training = dataclasses.replace(
        config.training, images=images, batch=batch, micro_batch=micro_batch
    )
    return dataclasses.replace(config, training=training)


def memory(
    config: Config, *, zero: Mapping[str, Any], ranks: int, micro_batch: int
) -> dict[str, int]:
    """Bytes of a rank by part, as `costs.memory`, with micro-batches of this size."""
    return costs.memory(
        costs.count(config),
        averages=len(kept(config.training)),
        zero=zero,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=-(-config.training.batch // (ranks * micro_batch)),
    )


def largest_micro_batch(config: Config, *, zero: Mapping[str, Any], ranks: int, room: float) -> int:
    """The largest micro-batch, up to a rank's share of the batch, that fits in `room` bytes."""
    share = config.training.batch // ranks

    def need(size: int) -> int:
        return sum(memory(config, zero=zero, ranks=ranks, micro_batch=size).values())

    # The whole share at once needs no sum of gradients, and may fit where somewhat less does not.
    if share and need(share) <= room:
        return share
    return bisect.bisect_right(range(1, share), room, key=need)


def memory_remark(
    config: Config, *, zero: Mapping[str, Any], ranks: int, room: float
) -> str | None:
    """What to set if a micro-batch needs more than the `room` bytes of a rank; else None."""
    training = config.training
    micro = training.micro_batch_on(ranks)
    need = sum(memory(config, zero=zero, ranks=ranks, micro_batch=micro).values())
    if need <= room:
        return None
    most = largest_micro_batch(config, zero=zero, ranks=ranks, room=room)
    fits = max((n for n in range(1, most + 1) if training.batch // ranks % n == 0), default=0)
    way = f"training.micro_batch = {fits}" if fits else "model.checkpoint = true"
    return (
        f"micro-batches of {micro} images need about {need / GIB:.0f} GiB of a GPU, and it "
        f"has {room / GIB:.0f} for them: if it runs out of memory, set {way}"
    )


def measured(machine: Machine, *, config: Config, run: Path) -> Machine:
    """The machine with the MFU that a run of this network reached lately, all waits included.

    Raises:
        ValueError: the run trains another network, or has no speed to read.
    """
    if configs.load(run / "config.toml").model != config.model:
        raise ValueError(f"--from {run}: it trains another network than this preset")
    try:
        # Rows of validations and evaluations have none.
        rates = [row[_RATE] for row in history.read(run)[-_ROWS:] if _RATE in row]
        newest = committed(run / "checkpoints")
        # Checkpoints of version 0.1 do not say how many ranks wrote them.
        ranks = checkpoints.read(newest[0]).state.ranks if newest else 0
    except (OSError, ValueError) as error:
        raise ValueError(f"--from {run}: {files.reason(error)}") from None
    expected = "there: name a run that this release has trained and saved"
    for there, what in ((rates, "a speed in metrics.jsonl"), (ranks, "ranks in its checkpoints")):
        check(bool(there), f"--from {run}: {what}", None, expected)
    mfu = statistics.median(rates) / ranks * operations(config) / (machine.tflops * 1e12)
    check(mfu <= 1, f"--from {run}: MFU", round(mfu, 2), "at most 1: give its GPUs' peak, --tflops")
    return dataclasses.replace(machine, mfu=mfu)
