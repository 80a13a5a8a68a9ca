"""What starting, agreeing and saving cost the ranks of a real job over gloo, for `bench.scale`.

A tiny network is trained for two steps by ranks that are forked from a process that has imported
everything.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer import train
from trainer.loop import Loop
from trainer.ranks.ending import run_as_rank
from trainer.ranks.group import Agreement
from trainer.save_schedule import SaveSchedule
from trainer.saver import Saver

#: Exchanges of flags that are timed.
EXCHANGES = 50
_TINY = ("model.channels = 32", "training.micro_batch = 1", "data.workers = 0")
Costs = dict[str, Any]


def job(ranks: int, *, shards: Path, scratch: Path) -> Costs:
    """The costs of a real job of so many ranks: of its slowest rank, and of its busiest."""
    batch = f"training.batch = {ranks}", f"training.images = {2 * ranks}"
    intervals = (f"intervals.{name} = {2 * ranks}" for name in ("log", "checkpoint", "samples"))
    settings = (f'data.shards = "{shards}"', *_TINY, *batch, *intervals)
    words = ["digits", "--run", str(scratch / f"run-{ranks}")]
    words += [word for setting in settings for word in ("--set", setting)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forks()
    files = [scratch / f"{ranks}-{rank}.json" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(files):
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env = {**who, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        process = context.Process(target=_rank, args=(env, words, file))
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    if not all(file.exists() for file in files):
        raise RuntimeError(f"a rank failed: {files[0].with_suffix('.txt').read_text()[-2000:]}")
    found = [json.loads(file.read_text()) for file in files]
    most = {name: max(row[name] for row in found) for name in found[0]}
    return {"kind": "job", "ranks": ranks, **most}


def forks() -> ForkServerContext:
    """What processes are forked from: a process that has imported everything."""
    context = get_context("forkserver")
    # The last one is what DeepSpeed imports as it makes an optimizer.
    context.set_forkserver_preload(["bench.jobs", "deepspeed.runtime.zero.muon.muon_optimizer"])
    return context


def _rank(env: dict[str, object], words: list[str], file: Path) -> None:
    """Train as one rank, and write what its parts cost."""
    os.environ.update({name: str(value) for name, value in env.items()})
    with file.with_suffix(".txt").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    found: dict[str, float] = dict.fromkeys(("save_s", "save_cpu_s"), 0.0)
    for owner, name in ((SaveSchedule, "save"), (Saver, "finish")):
        setattr(owner, name, _timed(getattr(owner, name), found))
    began, loop = (time.monotonic(), time.process_time()), Loop.train

    def timed_loop(self: Loop, batches: Any) -> int:
        wall, cpu = time.monotonic(), time.process_time()
        found.update(start_s=wall - began[0], start_cpu_s=cpu - began[1], **_agreements())
        return loop(self, batches)

    Loop.train = timed_loop  # type: ignore[method-assign]

    def main() -> int:
        status = train.main(words)
        file.write_text(json.dumps(found))
        return status

    run_as_rank(main)


def _timed(act: Callable[..., Any], found: dict[str, float]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        try:
            return act(*given, **named)
        finally:
            found["save_s"] += time.monotonic() - wall
            found["save_cpu_s"] += time.process_time() - cpu

    return run


def _agreements() -> dict[str, float]:
    """Milliseconds of one exchange of flags, as each step makes."""
    agreement = Agreement(3)
    dist.barrier()
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(EXCHANGES):
        agreement.exchange(False, False, False)
    agreement.close()
    each = 1e3 / EXCHANGES
    return {
        "agree_ms": each * (time.monotonic() - wall),
        "agree_cpu_ms": each * (time.process_time() - cpu),
    }
