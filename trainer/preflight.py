"""The preflight check of an allocation: a table with a row for each rank, and the bad nodes.

Started on every rank, by `srun python -m launch check`, mpirun or torchrun. The ranks write their
facts to a store on the main rank, which waits for a limited time: a node that cannot be reached is
a row of the table and not a hang.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import expanded, is_local
from data.exits import FAILED, REFUSED, CommandParser
from trainer.ranks.group import device_of
from trainer.ranks.world import World, join, step_hosts

# The size of the all-reduce that measures bandwidth, and how often it is timed.
_MEGABYTES, _ROUNDS = 64, 5
# A rank with less free disk is bad, and so is one whose clock is off by more seconds.
_LEAST_FREE_GIB, _MOST_SKEW = 10.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank reports about its machine."""

    rank: int
    host: str
    code: str
    versions: str
    gpus: str
    free_gib: float
    #: The error from reading the data or writing the run; empty without one.
    access: str
    #: The error from finding this rank's GPU; empty without one.
    device: str = ""


def problems(
    found: Sequence[Facts], *, clocks: Mapping[int, float], least_free_gib: float = _LEAST_FREE_GIB
) -> dict[int, str]:
    """What is wrong, by rank. A rank whose facts differ from those of most ranks is wrong.

    `clocks` are the ranks' seconds since 1970, read at the same moment.
    """
    wrong: dict[int, list[str]] = {facts.rank: [] for facts in found}
    for name in ("code", "versions", "gpus"):
        values = [getattr(facts, name) for facts in found]
        usual = max(values, key=values.count)
        for facts in found:
            if (value := getattr(facts, name)) != usual:
                wrong[facts.rank].append(f"{name}: {value}, elsewhere {usual}")
    middle = statistics.median_low(clocks.values()) if clocks else 0.0
    for facts in found:
        if abs(skew := clocks.get(facts.rank, middle) - middle) > _MOST_SKEW:
            wrong[facts.rank].append(f"clock is off by {skew:+.1f} s")
        if facts.free_gib < least_free_gib:
            wrong[facts.rank].append(f"{facts.free_gib:.1f} GiB of disk free")
        wrong[facts.rank] += [error for error in (facts.access, facts.device) if error]
    return {rank: "; ".join(said) for rank, said in wrong.items() if said}


def table(found: Sequence[Facts], *, wrong: Mapping[int, str], missing: Mapping[int, str]) -> str:
    """A row for each rank, those without an answer last; the last column says what is wrong."""
    lines = [f"{'rank':>5}  {'host':12} {'gpus':18} {'free GiB':>8} {'code':8} result"]
    for f in found:
        result = wrong.get(f.rank, "ok")
        lines.append(
            f"{f.rank:5}  {f.host:12} {f.gpus:18} {f.free_gib:8.1f} {f.code[:8]:8} {result}"
        )
    lines += [
        f"{rank:5}  {host:12} {'':18} {'':8} {'':8} no answer" for rank, host in missing.items()
    ]
    return "\n".join(lines)


def _facts(world: World, *, run: Path | None, data: str | None, gpus: int | None) -> Facts:
    """The facts of this rank."""
    packages = ("torch", "deepspeed", "webdataset", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        code=_fingerprint(Path(__file__).parent.parent),
        versions=", ".join([f"python {platform.python_version()}", *versions]),
        gpus=_gpus(),
        free_gib=_free_gib(run or Path.cwd()),
        access=_access(run, data, rank=world.rank),
        device=_device_error(world, gpus=gpus),
    )


def _free_gib(directory: Path) -> float:
    """The free space of a directory's disk; 0.0 where there is no such directory."""
    try:
        return shutil.disk_usage(directory).free / 2**30
    except OSError:
        return 0.0


def _fingerprint(root: Path) -> str:
    """A digest of the code that this rank runs."""
    digest = hashlib.sha256()
    for package in ("trainer", "data", "launch"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"[:18]


def _device_error(world: World, *, gpus: int | None) -> str:
    try:
        device_of(world, gpus=gpus)
    except ValueError as error:
        return str(error)
    return ""


def _access(run: Path | None, data: str | None, *, rank: int) -> str:
    """The error from using the directories, or ""; data behind a URL or a pipe is not tried."""
    try:
        if data is not None and is_local(data):
            root = Path(expanded(data, name="--data"))
            manifest = json.loads((root / "manifest.json").read_text())
            with (root / f"{manifest['shards'][0]['name']}.tar").open("rb") as shard:
                shard.read(1)
        if run is not None:
            probe = run / f".check-{rank}"
            probe.touch()
            probe.unlink()
    except (OSError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
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


def _clocks(world: World, *, store: dist.TCPStore) -> dict[int, float]:
    """The ranks' clocks at the same moment, when the main rank has received all their facts."""
    store.set(f"clock {world.rank}", str(time.time()))
    heard = _collect(world, store=store, what="clock", seconds=10.0)
    return {rank: float(text) for rank, text in heard.items()}


def _collect(world: World, *, store: dist.TCPStore, what: str, seconds: float) -> dict[int, str]:
    """What the ranks have written to the store in time, by rank; every rank gets the same."""
    if world.is_main:
        end, keys = time.monotonic() + seconds, [f"{what} {rank}" for rank in range(world.size)]
        while time.monotonic() < end and not store.check(keys):
            time.sleep(0.02)
        heard = {n: store.get(k).decode() for n, k in enumerate(keys) if store.check([k])}
        store.set(what, json.dumps(heard))
    return {int(rank): text for rank, text in json.loads(store.get(what)).items()}


def _all_reduce(world: World, *, store: dist.TCPStore, seconds: float) -> str:
    """A line with the latency and the bandwidth of an all-reduce among all ranks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("check", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=seconds),
    )
    small = _timed(torch.zeros(1, device="cuda" if cuda else "cpu"))
    large = _timed(torch.zeros(_MEGABYTES * 2**18, device="cuda" if cuda else "cpu"))
    dist.barrier()
    dist.destroy_process_group()
    # In a ring, each rank sends 2 (N - 1) / N bytes for every byte of the tensor.
    bus = _MEGABYTES / 1024 / large * 2 * (world.size - 1) / world.size
    return f"all-reduce of {world.size} ranks: {small * 1e3:.2f} ms, {bus:.2f} GiB/s"


def _timed(tensor: torch.Tensor) -> float:
    """Seconds of the fastest of a few all-reduces."""
    times = []
    for _ in range(_ROUNDS):
        began = time.monotonic()
        dist.all_reduce(tensor)
        tensor[:1].item()
        times.append(time.monotonic() - began)
    return min(times)


def _expected_host(rank: int, *, world: World) -> str:
    """The host on which a rank without an answer should run."""
    nodes = step_hosts()
    index = rank // world.local_size
    return nodes[index] if index < len(nodes) else "?"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m launch check",
        description="Check an allocation before a run; to be started on every rank.",
    )
    parser.add_argument(
        "--ranks", type=int, help="refuse another number of ranks (default: any number)"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        help="GPUs that each machine must show; 0: the job is for CPUs (default: any number)",
    )
    parser.add_argument(
        "--run", type=Path, help="a directory that must be writable (default: none is tried)"
    )
    parser.add_argument(
        "--data", help="a directory of shards that must be readable (default: none is tried)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=40.0,
        help="how long to wait for the other ranks (default: %(default)g)",
    )
    parser.add_argument(
        "--free",
        type=float,
        default=_LEAST_FREE_GIB,
        metavar="GIB",
        help="free disk space that each node must have (default: %(default)g)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the check; every rank returns the same status.

    0, or 78 when GPUs are missing, or 1 when something else is wrong.
    """
    arguments = _parser().parse_args(argv)
    world = join(expected_size=arguments.ranks)
    mine = _facts(world, run=arguments.run, data=arguments.data, gpus=arguments.gpus)
    store, found = _gather(world, mine=mine, seconds=arguments.seconds)
    clocks = _clocks(world, store=store)
    wrong = problems(found, clocks=clocks, least_free_gib=arguments.free)
    missing = _missing(world, found)
    bad = {f.host for f in found if f.rank in wrong} | set(missing.values())
    if world.is_main:
        print(table(found, wrong=wrong, missing=missing))
        print(found[0].versions)
        if bad:
            print(f"bad nodes: {', '.join(sorted(bad))}", flush=True)
    if any(facts.device for facts in found):
        return REFUSED
    if missing:
        return FAILED
    try:
        speed = _all_reduce(world, store=store, seconds=arguments.seconds)
    except RuntimeError as error:
        print(f"{mine.host}: rank {world.rank}: all-reduce failed: {error}", file=sys.stderr)
        return FAILED
    if world.is_main:
        print(speed)
        if not bad:
            print("all nodes are ready", flush=True)
    return FAILED if bad else 0


def _missing(world: World, found: Sequence[Facts]) -> dict[int, str]:
    """The ranks without an answer, and where they should run."""
    answered = {facts.rank for facts in found}
    absent = (rank for rank in range(world.size) if rank not in answered)
    return {rank: _expected_host(rank, world=world) for rank in absent}
