"""How training scales to 512 GPUs: predicted from counted bytes and measured costs.

    python -m bench.scale [PRESET] [--gpu bench-gpu.jsonl] [--ranks 2 4 8 16 32] [--mfu M ...]

Measured on this machine: what starting, agreeing and saving cost real ranks over gloo, by their
number, with a tiny network; and the images per second of eight ranks' data layer. Predicted, by
`trainer.plan`'s own model: the step on 8 to 512 GPUs over stated networks, from the step that
`bench.gpu` measured (`--gpu`), or from stated rates. Each figure is a line of JSON in `--out`.

More ranks than CPUs take turns, so the processor time of the busiest rank is extrapolated, not the
time that passed. Python's imports are left out: every rank does them at once.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.gpu import BEST, Cell, origin
from bench.jobs import forks, job
from bench.photos import make_photos
from data.config import DataConfig
from data.dataset import open_shards
from data.pack import main as pack
from data.stream import Stream
from trainer import plan
from trainer.config import ds_config
from trainer.config import experiment as configs
from trainer.planning import prediction
from trainer.planning.prediction import Machine

#: What NCCL reaches there, as published for nodes of 8 H100: GB/s of each rank.
NETWORKS = {"8 x 400 Gb/s per node": 340.0, "1 x 400 Gb/s per node": 40.0}
GPUS = (8, 16, 32, 64, 128, 256, 512)
#: Ranks of a node.
NODE = 8
#: What a job's ranks report, and what is extrapolated of it.
COSTS = ("start_cpu_s", "agree_cpu_ms", "save_cpu_s")
_begin: Any


def extrapolated(rows: Sequence[Cell], *, ranks: int) -> Iterator[Cell]:
    """Each cost at so many ranks, on the line that fits the measured ones best and never falls."""
    for name in COSTS:
        x, y = [row["ranks"] for row in rows], [row[name] for row in rows]
        slope = max(0.0, np.polyfit(x, y, 1)[0])
        base = np.mean(y) - slope * np.mean(x)
        yield {
            "kind": "extrapolated",
            "cost": name,
            "at_none": float(base),
            "per_rank": float(slope),
            "ranks": ranks,
            "value": float(base + slope * ranks),
        }


def data(*, shards: Path, size: int, seconds: float, needed: float) -> Cell:
    """Images per second of the data layer of a node's ranks at once, with a worker each."""
    context = forks()
    begin = context.Barrier(NODE)
    work = partial(_serve, shards=shards, size=size, seconds=seconds)
    with ProcessPoolExecutor(NODE, context, initializer=_keep, initargs=(begin,)) as pool:
        found = list(pool.map(work, range(NODE)))
    images, cpu = sum(each[0] for each in found), sum(each[1] for each in found)
    return {
        "kind": "data",
        "size": size,
        "ranks": NODE,
        "images/s": images / seconds,
        "CPU ms per image": 1e3 * cpu / images,
        "images/s needed": needed,
        "CPUs needed": needed * cpu / images,
    }


def _keep(begin: Any) -> None:
    global _begin
    _begin = begin


def _serve(rank: int, *, shards: Path, size: int, seconds: float) -> tuple[int, float]:
    """Images and seconds of the processor, counted while all ranks run."""
    try:
        config = DataConfig(shards=str(shards), image_size=size, workers=1, streams=NODE)
        this, images = psutil.Process(), 0
        with Stream(open_shards(shards), config=config, seed=0) as stream:
            batches = stream.batches(
                images_seen=0, batch_size=32 * NODE, micro_batch_size=32, rank=rank, ranks=NODE
            )
            next(batches)
            _begin.wait()
            began, busy = time.monotonic(), _cpu(this)
            while time.monotonic() < began + seconds:
                images += len(next(batches).images)
            return images, _cpu(this) - busy
    except BaseException:
        _begin.abort()  # or the others would wait for this one
        raise


def _cpu(this: psutil.Process) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in (this, *this.children(recursive=True)))


def measured_step(machine: Machine, *, config: configs.Config, file: Path) -> Machine:
    """The machine with the speed that `bench.gpu` measured: at the most images, and at the fewest.

    Raises:
        ValueError: the file has no such step.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [
        row
        for row in rows
        if row.get("system") == BEST
        and row.get("size") == config.model.image_size
        and row.get("precision") == config.training.precision
        and "images/s" in row
        and row["kind"] == "step"
    ]
    if not steps:
        raise ValueError(f"--gpu {file}: it has no step of {config.model.image_size} px")
    most, fewest = (choose(steps, key=lambda row: float(row["images"])) for choose in (max, min))
    return dataclasses.replace(
        machine,
        mfu=min(1.0, most["model TFLOP/s"] / machine.tflops),
        host_ms=1e3 * fewest["images"] / fewest["images/s"] if most is not fewest else 0.0,
    )


def predicted(config: configs.Config, *, machine: Machine) -> Iterator[Cell]:
    """The step on each number of GPUs, at the preset's batch and at 32 images per GPU."""
    zero = ds_config.load("ds_config.json")["zero_optimization"]
    own = {n: config.training.batch for n in GPUS if config.training.batch % n == 0}
    for batches in (own, {n: 32 * n for n in GPUS}):
        steps = prediction.scaled(config, machine=machine, zero=zero, batches=batches)
        for gpus, now in steps.items():
            if now is not None:
                times = {"compute": now.compute, "network": now.communication, "host": now.host}
                yield {
                    "gpus": gpus,
                    "images per GPU": now.batch // gpus,
                    **{f"{name} ms": 1e3 * value for name, value in times.items()},
                    "images/s per GPU": now.batch / gpus / now.seconds,
                    "efficiency": now.efficiency,
                    "limit": now.limit,
                }


def table(rows: Sequence[Cell]) -> Iterator[str]:
    """All rows of each kind as a table."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]
        yield f"\n{kind}\n| {' | '.join(own[0])} |\n{'|---' * len(own[0])}|"
        for row in own:
            cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            yield f"| {' | '.join(cells)} |"


def rows_of(options: argparse.Namespace, *, scratch: Path) -> Iterator[Cell]:
    """All that is predicted and measured, the quickest first."""
    config, machine = configs.load(options.preset), plan.machine_of(options, gpus=NODE)
    if options.gpu is not None:
        machine = measured_step(machine, config=config, file=options.gpu)
    yield {"kind": "assumed", "mfu": machine.mfu, "host_ms": machine.host_ms}
    best = 0.0
    for network, bandwidth in NETWORKS.items():
        for row in predicted(config, machine=dataclasses.replace(machine, bandwidth=bandwidth)):
            best = max(best, row["images/s per GPU"])
            yield {"kind": f"predicted, {network}", **row}
    size = config.model.image_size
    make_photos(scratch / "photos", images=options.images, classes=10, longest=2 * size)
    for words in (["digits", "8"], [str(scratch / "photos"), str(size)]):
        pack([words[0], str(scratch / words[1]), "--size", words[1]])
    yield data(shards=scratch / str(size), size=size, seconds=options.seconds, needed=NODE * best)
    jobs: list[Cell] = []
    for ranks in options.ranks:
        jobs.append(job(ranks, shards=scratch / "8", scratch=scratch))
        yield jobs[-1]
    if len(jobs) > 1:
        yield from extrapolated(jobs, ranks=GPUS[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.scale`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    add = parser.add_argument
    add("preset", nargs="?", default="imagenet64", help="default: %(default)s")
    add("--gpu", type=Path, help="lines of bench.gpu, for the measured step (default: --mfu)")
    add("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32], help="default: %(default)s")
    add("--images", type=int, default=500, help="photographs to make (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="of the data layer (default: %(default)g)")
    add("--out", type=Path, default=Path("bench-scale.jsonl"), help="default: %(default)s")
    plan.add_rates(parser)
    options, own, rows = parser.parse_args(argv), origin(), list[Cell]()
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows_of(options, scratch=Path(scratch)):
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps({**own, **row}) + "\n")
            print(json.dumps(row), flush=True)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
