"""The preflight check of an allocation: a table with a row for each rank, and the bad nodes.

Started on every rank, by `srun python -m launch check`, mpirun, torchrun or `deepspeed`. The ranks
write their facts to a store on the main rank, which waits for a limited time: a node that cannot be
reached is a row of the table and not a hang.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data import descriptors, files
from data.config import expanded, is_local
from data.dataset import open_shards, unlisted
from data.exits import FAILED, REFUSED, CommandParser, place_text
from data.manifest import MANIFEST
from data.version import digest
from trainer.adm.config import check
from trainer.options import add_ranks
from trainer.planning.facts import LEAST_FREE_GIB, Facts, problems, speed, table
from trainer.ranks.device import device_of
from trainer.ranks.faults import Fault
from trainer.ranks.process_group import check_packets
from trainer.ranks.world import World, host_name, join, step_hosts

# The MiB of the all-reduce that measures bandwidth, and how often it is timed.
_MEGABYTES, _ROUNDS = 64, 5
# Torch's timers would overflow beyond.
_MOST_SECONDS = 10**6


def _facts(world: World, *, run: Path | None, data: str | None, gpus: int | None) -> Facts:
    """The facts of this rank."""
    packages = ("torch", "deepspeed", "webdataset", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return Facts(
        rank=world.rank,
        host=host_name(),
        code=digest(),
        versions=", ".join([f"python {platform.python_version()}", *versions]),
        gpus=_gpus(),
        free_gib=_free_gib(run or Path.cwd()),
        lookup=_lookup_seconds(world),
        access=_access(run, data, rank=world.rank),
        device=_device_error(world, gpus=gpus),
    )


def _lookup_seconds(world: World) -> float:
    """Seconds in which the resolver names the address that the other ranks see of this machine.

    The quicker of two: the machine may have been busy.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.connect((world.address, world.port))  # chooses the interface, and sends nothing
        times = []
        for _ in range(2):
            began = time.monotonic()
            with suppress(OSError):
                socket.getnameinfo(probe.getsockname(), 0)
            times.append(time.monotonic() - began)
    return min(times)


def _free_gib(directory: Path) -> float:
    """The free space of the disk of a directory, or of where it would be; 0.0 if unreadable."""
    try:
        return shutil.disk_usage(files.nearest(directory.absolute())).free / 2**30
    except OSError:
        return 0.0


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    try:
        name = torch.cuda.get_device_name(0)
    except RuntimeError:  # `_device_error` says more
        name = "broken"
    return f"{torch.cuda.device_count()} x {name}"[:18]


def _device_error(world: World, *, gpus: int | None) -> str:
    try:
        device_of(world, gpus=gpus)
    except ValueError as error:
        return str(error)
    except RuntimeError as error:
        return Fault.of_gpu(error, host=host_name()).text
    return ""


def _access(run: Path | None, data: str | None, *, rank: int) -> str:
    """The error of reading the data or writing the run, or ""; remote data is not tried."""
    try:
        if data is not None and is_local(data):
            root = Path(expanded(data, name="--data"))
            if not (root / MANIFEST).exists():
                return f"--data {root}: no {MANIFEST}: mount its disk here, or run data.pack"
            manifest = json.loads((root / MANIFEST).read_text())
            with (root / f"{manifest['shards'][0]['name']}.tar").open("rb") as shard:
                shard.read(1)
        if run is not None and not run.is_dir():
            return f"--run {run}: no directory here: make it, or mount its disk on this node"
        if run is not None:
            probe = run / f".check-{rank}"
            probe.touch()
            probe.unlink()
    except (OSError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {files.reason(error)}"
    return ""


def _data_remark(data: str | None) -> str:
    """A line about the data, or ""; what cannot be read is an error of `_access`."""
    with suppress(ValueError, OSError):
        if data is not None and is_local(data):
            return unlisted(open_shards(data, check_files=False, named="--data"))
    return ""


def _gather(world: World, *, mine: Facts, seconds: float) -> tuple[dist.TCPStore, list[Facts]]:
    """The facts of all ranks that answer in time; every rank gets the same."""
    store = dist.TCPStore(
        world.address,
        world.port,
        is_master=world.is_main,
        wait_for_workers=False,
        timeout=timedelta(seconds=2 * seconds),
    )
    store.set(f"facts {world.rank}", json.dumps(vars(mine)))
    heard = _collect(world, store=store, what="facts", seconds=seconds)
    return store, [Facts(**json.loads(text)) for text in heard.values()]


def _clocks(world: World, *, store: dist.TCPStore) -> dict[int, tuple[float, float]]:
    """By how many seconds each rank's clock is ahead of the main rank's, at least and at most.

    A rank reads it after the main rank has begun, and before the main rank hears of it: on a busy
    machine that may be seconds, which say nothing about its clock.
    """
    began = time.time()
    if world.is_main:
        store.set("begun", "")
    store.get("begun")
    store.set(f"clock {world.rank}", str(time.time()))

    def ahead(text: str) -> tuple[float, float]:
        return float(text) - time.time(), float(text) - began

    heard = _collect(world, store=store, what="clock", seconds=10.0, hear=ahead)
    return {rank: (least, most) for rank, (least, most) in heard.items()}


def _collect(
    world: World,
    *,
    store: dist.TCPStore,
    what: str,
    seconds: float,
    hear: Callable[[str], Any] = str,
) -> dict[int, Any]:
    """What the main rank has heard of what each rank writes to the store within `seconds`.

    `hear` makes plain JSON of it as it comes; the same on all ranks.
    """
    if world.is_main:
        end, heard, missing = time.monotonic() + seconds, dict[int, Any](), set(range(world.size))
        while missing:
            is_over = time.monotonic() > end
            for rank in [n for n in missing if store.check([f"{what} {n}"])]:
                heard[rank] = hear(store.get(f"{what} {rank}").decode())
                missing.remove(rank)
            if is_over:
                break
            time.sleep(0.02 if missing else 0)
        store.set(what, json.dumps(heard))
    return {int(rank): found for rank, found in json.loads(store.get(what)).items()}


def _all_reduce(world: World, *, store: dist.TCPStore, seconds: float) -> str:
    """A line with the latency and the bandwidth of an all-reduce among all ranks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("check", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=seconds),
    )
    check_packets()
    small = _timed(torch.zeros(1, device="cuda" if cuda else "cpu"))
    large = _timed(torch.zeros(_MEGABYTES * 2**18, device="cuda" if cuda else "cpu"))
    dist.barrier()
    dist.destroy_process_group()
    return speed(_MEGABYTES, small, large, ranks=world.size)


def _timed(tensor: torch.Tensor) -> float:
    """Seconds of the fastest of a few all-reduces."""
    times = []
    for _ in range(_ROUNDS):
        began = time.monotonic()
        dist.all_reduce(tensor)
        tensor[:1].item()
        times.append(time.monotonic() - began)
    return min(times)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m launch check",
        description="Check an allocation before a run; to be started on every rank.",
    )
    add_ranks(parser, work="check")
    run = "a directory that must be writable (default: none is tried)"
    parser.add_argument("--run", type=Path, help=run)
    data = "a directory of shards that must be readable (default: none is tried)"
    parser.add_argument("--data", type=place_text, help=data)
    seconds = "how long to wait for the other ranks (default: %(default)g)"
    parser.add_argument("--seconds", type=float, default=40.0, help=seconds)
    free = "free disk space that each node must have (default: %(default)g)"
    parser.add_argument("--free", type=float, default=LEAST_FREE_GIB, metavar="GIB", help=free)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the check; every rank returns the same status.

    0, or 78 when GPUs are missing, or 1 when something else is wrong.
    """
    arguments = _parser().parse_args(argv)
    seconds, free = arguments.seconds, arguments.free
    check(0 < seconds <= _MOST_SECONDS, "--seconds", seconds, f"above 0, at most {_MOST_SECONDS}")
    check(free >= 0, "--free", free, "at least 0")
    descriptors.raise_limit()  # as training does, for the connections of all ranks
    world = join(expected_size=arguments.ranks)
    mine = _facts(world, run=arguments.run, data=arguments.data, gpus=arguments.gpus)
    store, found = _gather(world, mine=mine, seconds=seconds)
    clocks = _clocks(world, store=store)
    wrong = problems(found, clocks=clocks, least_free_gib=free)
    missing = _missing(world, found)
    bad = {f.host for f in found if f.rank in wrong} | set(missing.values())
    if world.is_main:
        print(table(found, wrong=wrong, missing=missing))
        print(found[0].versions)
        if remark := _data_remark(arguments.data):
            print(remark)
        if bad:
            print(f"bad nodes: {', '.join(sorted(bad))}", flush=True)
    lacks_gpus = any(facts.device for facts in found)
    if missing or lacks_gpus:
        _part(world, store=store, found=found)
        return REFUSED if lacks_gpus else FAILED
    try:
        measured = _all_reduce(world, store=store, seconds=seconds)
    except (RuntimeError, ConnectionError) as error:
        print(f"{mine.host}: rank {world.rank}: all-reduce failed: {error}", file=sys.stderr)
        return FAILED
    if world.is_main:
        print(measured)
        if not bad:
            print("all nodes are ready", flush=True)
    return FAILED if bad else 0


def _part(world: World, *, store: dist.TCPStore, found: Sequence[Facts]) -> None:
    """Wait on the main rank until all have read what they need: the store ends with its process."""
    store.set(f"leaves {world.rank}", "")
    if world.is_main:
        with suppress(RuntimeError):  # one of them may be lost meanwhile
            store.wait([f"leaves {facts.rank}" for facts in found], timedelta(seconds=10))


def _missing(world: World, found: Sequence[Facts]) -> dict[int, str]:
    """The ranks without an answer, and the hosts on which they should run ("?": unknown)."""
    nodes, answered = step_hosts(), {facts.rank for facts in found}
    absent = sorted(set(range(world.size)) - answered)
    return {rank: nodes[rank] if rank < len(nodes) else "?" for rank in absent}
