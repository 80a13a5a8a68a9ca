"""Plan a run before it is queued: memory, micro-batch, disk, data rate, time, and what limits it.

  python -m trainer.plan PRESET --gpus N --gpu-memory G [--bandwidth B] [--mfu M | --from RUN]
  python -m trainer.plan all --gpus N     a table of all presets

Bytes and operations are counted from the preset and ds_config.json. Rates are inputs, which the
first lines repeat: measure them (`--from RUN` takes the speed of a run) or state them.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.config import naming
from data.exits import CommandParser, reported
from data.mixture import open_dataset
from data.progress import duration
from trainer.adm.config import check
from trainer.config import ds_config, settings
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine import caches
from trainer.engine.averages import kept
from trainer.engine.compute import DTYPES
from trainer.planning import costs
from trainer.planning.prediction import (
    GB,
    GIB,
    Machine,
    Step,
    largest_micro_batch,
    measured,
    memory,
    memory_remark,
    overlaps,
    scaled,
    step,
)

# Images per GPU of the table of weak scaling.
_WEAK = 32


def report(
    config: Config, *, machine: Machine, zero: Mapping[str, Any], name: str
) -> Iterable[str]:
    """The lines of a preset's plan."""
    net = costs.count(config)
    training = config.training
    hidden = machine.overlap if overlaps(zero) else 0.0
    yield (
        f"{name}: {net.parameters:,} parameters, {net.forward_flops / 1e9:,.1f} GFLOP per image "
        f"forward, {net.saved_bytes / 1e6:,.0f} MB of activations per image, {training.precision}"
    )
    yield (
        f"assumed: {machine.mfu:.0%} of {machine.tflops:g} TFLOP/s per GPU, {machine.bandwidth:g} "
        f"GB/s and {machine.latency:g} us between ranks, at most {hidden:.0%} of "
        f"reductions hidden, {machine.host_ms:g} ms of the host per micro-batch, "
        f"{machine.reserve:g} GiB of {machine.gpu_memory:g} reserved"
    )
    yield from _memory_lines(config, machine=machine, zero=zero)
    yield from _disk_lines(config, net.parameters)
    yield from _data_lines(config, step(config, machine=machine, gpus=machine.gpus, zero=zero))
    yield from _scale_lines(config, machine=machine, zero=zero)


def overview(*, machine: Machine, zero: Mapping[str, Any]) -> Iterable[str]:
    """A Markdown table of all presets of ImageNet and LSUN on this machine.

    Raises:
        ValueError: the batch of a preset, which is named, does not divide among so many GPUs.
    """
    heads = "preset | parameters | batch | steps | published | micro-batch | GiB per GPU | GPU days"
    yield f"| {heads} |\n|{'---|' * 8}"
    presets = [(configs.load(path), path) for path in configs.PRESETS.glob("*[0-9]*.toml")]
    presets.sort(key=lambda each: (each[0].objective == "classify", each[1].stem))
    for config, path in presets:
        training, net = config.training, costs.count(config)
        published = re.findall(r"(FID .*)\.\n", path.read_text())
        with naming(path.stem):
            micro = training.micro_batch_on(machine.gpus)
        needed = memory(config, zero=zero, ranks=machine.gpus, micro_batch=micro)
        now = step(config, machine=machine, gpus=machine.gpus, zero=zero)
        days = training.images / now.batch * now.seconds / 86400 * machine.gpus
        cells = (
            f"`{path.stem}`",
            f"{net.parameters / 1e6:.1f}M",
            f"{training.batch}",
            f"{training.images // training.batch // 1000}K",
            published[0] if published else "",
            f"{micro}",
            f"{sum(needed.values()) / GIB + machine.reserve:.0f}",
            f"{days:,.0f}",
        )
        yield f"| {' | '.join(cells)} |"


def _memory_lines(config: Config, *, machine: Machine, zero: Mapping[str, Any]) -> Iterable[str]:
    ranks, micro = machine.gpus, config.training.micro_batch_on(machine.gpus)
    yield f"\nMemory of a rank on {ranks} GPUs with micro-batches of {micro}, GiB:"
    stages = [{**zero, "stage": stage} for stage in (1, 2, 3)]
    tables = [memory(config, zero=s, ranks=ranks, micro_batch=micro) for s in stages]
    titles = [f"stage {s['stage']}{'*' if s['stage'] == zero['stage'] else ''}" for s in stages]
    yield _row("", titles)
    for part in dict.fromkeys(part for table in tables for part in table):
        yield _row(part, [f"{table[part] / GIB:.2f}" if part in table else "" for table in tables])
    yield _row("together", [f"{sum(table.values()) / GIB:.2f}" for table in tables])
    room = machine.memory_room
    most = [largest_micro_batch(config, zero=s, ranks=ranks, room=room) for s in stages]
    yield _row("largest micro-batch", [str(size or "none fits") for size in most])
    yield "(* the stage of --ds-config; the largest micro-batch is at most a rank's share)"
    remark = memory_remark(config, zero=zero, ranks=ranks, room=room)
    yield from () if remark is None else (remark,)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<28}" + "".join(f"{cell:>12}" for cell in cells)


def _disk_lines(config: Config, parameters: int) -> Iterable[str]:
    every, training = config.intervals, config.training
    size = 4 * parameters * (3 + len(kept(training))) / GB
    # Not more than there are checkpoints.
    stay = training.images // max(every.keep_every, every.checkpoint) if every.keep_every else 0
    # One is being written while the newest are kept.
    most = every.keep + 1 + stay
    count = training.images // every.checkpoint
    yield (
        f"\nDisk: {size:.2f} GB per checkpoint, {count:,} of them; up to {most:,} at once "
        f"(intervals.keep = {every.keep}, {stay:,} by intervals.keep_every): {size * most:,.0f} GB"
    )
    if every.averages is not None:
        each = (
            len(training.ema_widths) * parameters * DTYPES[every.averages_precision].itemsize / GB
        )
        times = training.images // every.averages
        yield f"and {times:,} snapshots of averages, {each:.2f} GB each: {times * each:,.0f} GB"


def _data_lines(config: Config, now: Step) -> Iterable[str]:
    rate = now.batch / now.seconds
    line = f"Data: {rate:,.0f} images/s in all, {rate / now.gpus:,.1f} per GPU"
    data = config.data
    try:
        dataset = open_dataset(data.shards, mix=data.mix, shares=data.mix_shares)
    except (ValueError, OSError) as error:
        yield f"{line}; bytes are not known here: {error}"
    else:
        mean = sum(
            share * sum(shard.bytes for shard in part.shards) / max(part.count, 1)
            for part, share in dataset.shares
        )
        yield f"{line}: {rate * mean / 1e6:,.1f} MB/s at {mean / 1e3:.1f} kB per image"
    seconds = config.training.images / rate
    days = seconds / 86400
    time = f"{days:,.1f} days" if days >= 1 else duration(seconds)
    yield (
        f"Time: {time} on {now.gpus} GPUs, {days * now.gpus:,.0f} GPU days, for "
        f"{config.training.images:,} images ({config.training.images // now.batch:,} steps)"
    )


def _scale_lines(config: Config, *, machine: Machine, zero: Mapping[str, Any]) -> Iterable[str]:
    training = config.training
    counts = [n for n in (1, 8, 16, 32, 64, 128, 256, 512) if training.batch % n == 0]
    counts = sorted({*counts, machine.gpus})
    yield f"\nAt the preset's batch of {training.batch}, ZeRO stage {zero['stage']}:"
    own = dict.fromkeys(counts, training.batch)
    yield from _table(config, machine=machine, zero=zero, batches=own)
    yield f"\nAt {_WEAK} images per GPU (another batch is another experiment):"
    wide = {n: _WEAK * n for n in (8, 16, 32, 64, 128, 256, 512)}
    yield from _table(config, machine=machine, zero=zero, batches=wide)


def _table(
    config: Config, *, machine: Machine, zero: Mapping[str, Any], batches: Mapping[int, int]
) -> Iterable[str]:
    heads = ("per GPU", "micro-batch", "step ms", "network ms", "host ms", "images/s", "efficiency")
    yield f"  {'GPUs':>5}" + "".join(f"{head:>12}" for head in heads) + "  limited by"
    for gpus, now in scaled(config, machine=machine, zero=zero, batches=batches).items():
        batch = batches[gpus]
        if now is None:
            yield f"  {gpus:>5}{batch // gpus:>12}   does not fit in {machine.gpu_memory:g} GiB"
            continue
        cells = (
            f"{batch // gpus}",
            f"{now.micro_batch}",
            f"{now.seconds * 1e3:.0f}",
            f"{now.communication * 1e3:.0f}",
            f"{now.host * 1e3:.0f}",
            f"{batch / now.seconds:,.0f}",
            f"{now.efficiency:.0%}",
        )
        yield f"  {gpus:>5}" + "".join(f"{cell:>12}" for cell in cells) + f"  {now.limit}"


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of the rates of a `Machine`."""
    rates = (
        ("gpu-memory", 80.0, "GiB of each GPU"),
        ("reserve", 4.0, "GiB of it that CUDA, NCCL and fragmentation take"),
        ("tflops", 989.0, "peak of a GPU in the training precision, in TFLOP/s"),
        ("mfu", 0.35, "share of the peak that a step's computing reaches"),
        ("bandwidth", 40.0, "GB/s that each rank sends in a collective"),
        ("latency", 5.0, "microseconds that a message takes from a rank to the next"),
        ("overlap", 0.8, "share of the gradients' reduction that computing may hide"),
        ("host-ms", 38.0, "milliseconds of the host for a micro-batch (bench.host)"),
    )
    for name, default, text in rates:
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"{text} (default: %(default)s)"
        )


def machine_of(arguments: argparse.Namespace, *, gpus: int) -> Machine:
    """The machine that the options of `add_rates` state; ValueError for what is impossible."""
    names = [field.name for field in dataclasses.fields(Machine) if field.name != "gpus"]
    return Machine(gpus=gpus, **{name: getattr(arguments, name) for name in names})


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m trainer.plan",
        description="Plan a run: memory, micro-batch, disk, data rate, time, and what limits it.",
    )
    parser.add_argument("preset", help="a name in trainer/presets, a .toml file, or all (a table)")
    settings.add_overrides(parser)
    parser.add_argument("--ds-config", help=f"default: {ds_config.DEFAULT}")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, one rank on each")
    add_rates(parser)
    parser.add_argument(
        "--from",
        dest="run",
        type=Path,
        metavar="RUN",
        help="take the speed of each GPU from this run of the same network (default: --mfu)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit status."""
    arguments = parser().parse_args(argv)
    return reported(lambda: _print(arguments))


def _print(arguments: argparse.Namespace) -> int:
    caches.check_made()
    zero = ds_config.load(arguments.ds_config)["zero_optimization"]
    machine = machine_of(arguments, gpus=arguments.gpus)
    if arguments.preset == "all":
        given = {"--set": arguments.set, "--unset": arguments.unset, "--from": arguments.run}
        for name, value in given.items():
            check(not value, name, value, "absent with `all`: presets as they are")
        lines = overview(machine=machine, zero=zero)
    else:
        config = configs.load(arguments.preset, arguments.set, unset=arguments.unset)
        config.training.micro_batch_on(machine.gpus)
        if arguments.run is not None:
            machine = measured(machine, config=config, run=arguments.run)
        lines = report(config, machine=machine, zero=zero, name=arguments.preset)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
