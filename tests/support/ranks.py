"""Real ranks for the tests: processes that meet over gloo and train real runs.

Importing torch and DeepSpeed takes a rank 5 to 10 seconds of CPU, more than a tiny run. So one
process does that once and every rank is a fork of it; each trains the runs that it is given one
after the other. What they did is read from the run directories and from `statuses`.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
# Seconds after which a process counts as hung, on the slowest machine.
LIMIT = 600.0
# Ports below those that the system gives away, from another one on in each process.
_PORTS = (20000 + (37 * os.getpid() + n) % 10000 for n in range(10000))
_LAST = "deepspeed.runtime.zero.muon.muon_optimizer"


@dataclass
class Job:
    """The processes of a job, rank by rank."""

    directory: Path
    ranks: list[ForkServerProcess]

    def wait(self) -> str:
        """Wait for all ranks, and return what rank 0 printed; a rank that hangs is an error."""
        end = time.monotonic() + LIMIT
        for rank, process in enumerate(self.ranks):
            process.join(max(0.0, end - time.monotonic()))
            assert not process.is_alive(), f"rank {rank} hangs\n{self.text}"
        return self.texts[0]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    @property
    def texts(self) -> list[str]:
        """What each rank printed."""
        return [output(self.directory, rank).read_text() for rank in range(len(self.ranks))]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def statuses(self) -> list[int | str]:
        """The status of every run, or the error that refused it."""
        report = self.directory / "report.json"
        assert report.exists(), self.text
        return json.loads(report.read_text())


def output(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.txt"


def start(directory: Path, *, ranks: int, runs: list[list[str]], fp16: bool = False) -> Job:
    """Start a job of `ranks` processes. A run is "train" or "sample", and that tool's arguments."""
    return fork(directory, partial(work, directory, runs, fp16), ranks=ranks)


def sample(root: Path, *runs: list, world: int = 1) -> list[int | str]:
    """Draw samples with these arguments, one request after the other; their statuses."""
    words = [["sample", *map(str, run)] for run in runs]
    job = start(root / f"job-{world}", ranks=world, runs=words)
    job.wait()
    return job.statuses


def arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a sample file."""
    with np.load(file) as samples:
        assert set(samples) == {"arr_0", "arr_1", "request"}
        return samples["arr_0"], samples["arr_1"]


def fork(directory: Path, task: Callable[[], int], *, ranks: int) -> Job:
    """Start `ranks` processes that all do the same; `join` tells each who it is."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        output(directory, rank).touch()
        process = forks().Process(target=live, args=(directory, env, task))
        process.start()
        processes.append(process)
    return Job(directory, processes)


@cache
def forks() -> ForkServerContext:
    """What ranks are forked from: a process of its own, without threads, that has imported all."""
    context = get_context("forkserver")
    # The last one is what DeepSpeed imports as it makes an optimizer: torch's compiler.
    context.set_forkserver_preload(["trainer.train", "trainer.sample", _LAST])
    before = dict(os.environ)
    own = environment()
    os.environ.clear()
    os.environ.update(own, PYTHONPATH=str(ROOT))
    try:
        process = context.Process(target=compile_operator)
        process.start()
        process.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def compile_operator() -> None:
    """In a new environment DeepSpeed takes minutes for it, which are no rank's that hangs."""
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


def wait_for(path: Path) -> None:
    """Wait until a file or directory is there."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def environment() -> dict[str, str]:
    """What a process of a job is started with: one thread, no GPU, this Python's own tools first.

    (Another `ninja` in the PATH would compile DeepSpeed's operators again.)
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # The tests may themselves run in a job: its ranks are others.
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    return {**inherited, **own, "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A port that no process has, nor gets by asking for any, and that no job before was given."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no port is free")


def live(directory: Path, env: dict[str, str], task: Callable[[], int]) -> None:
    """The life of one rank."""
    from trainer.ranks.ending import run_as_rank

    os.environ.update(env)
    with output(directory, int(env["RANK"])).open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_as_rank(task)


def work(directory: Path, runs: list[list[str]], fp16: bool, patience: float = LIMIT) -> int:
    """Do the runs one after the other, as one rank among all."""
    from trainer import sample, train
    from trainer.ranks.context import RankContext
    from trainer.ranks.process_group import connected
    from trainer.ranks.signals import Preemption
    from trainer.ranks.watchdog import Watchdog
    from trainer.ranks.world import join
    from trainer.sampling.jobstate import JobState

    if fp16:  # DeepSpeed refuses fp16 on most CPUs by this check alone
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    world = join()
    statuses: list[int | str] = []
    with (
        Preemption() as preemption,
        connected(world, patience=patience) as device,
        Watchdog(world, patience=patience) as watchdog,
    ):
        context = RankContext(world=world, device=device, preemption=preemption, watchdog=watchdog)
        draw = partial(sample.sample, context=context, state=JobState(None))
        tools: dict[str, tuple[Callable, Callable]] = {
            "train": (train.parser, partial(train.train, context=context)),
            "sample": (sample.parser, draw),
        }
        for tool, *arguments in runs:
            parser, use = tools[tool]
            try:
                statuses.append(use(parser().parse_args(arguments)))
            except ValueError as error:
                statuses.append(str(error))
    if world.is_main:
        (directory / "report.json").write_text(json.dumps(statuses))
    return 0
