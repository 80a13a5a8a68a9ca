"""Real ranks for the tests: processes that meet over gloo and train real runs.

`start` starts the ranks of one job; each rank trains the runs that it is given one after the
other in one process group, since a start costs seconds and a tiny run does not. What they did is
read from the run directories and from `statuses`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 240.0


@dataclass
class Job:
    """The processes of a job, rank by rank."""

    ranks: list[subprocess.Popen[str]]
    report: Path

    def wait(self) -> str:
        """Wait for all ranks, and return what rank 0 printed; a rank that hangs is an error."""
        texts = [rank.communicate(timeout=LIMIT)[0] for rank in self.ranks]
        self.texts = texts
        return texts[0]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.send_signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.communicate()

    @property
    def statuses(self) -> list[int | str]:
        """The status of every run, or the error that refused it."""
        return json.loads(self.report.read_text())


def start(directory: Path, *, ranks: int, runs: list[list[str]], fp16: bool = False) -> Job:
    """Start a job of `ranks` processes. A run is "train" or "sample", and that tool's arguments."""
    directory.mkdir(parents=True, exist_ok=True)
    order, report = directory / "order.json", directory / "report.json"
    order.write_text(json.dumps({"runs": runs, "fp16": fp16, "report": str(report)}))
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {
            **environment(),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "tests.ranks", str(order)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return Job(processes, report)


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
    return {**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(order: Path) -> None:
    """What one rank does."""
    from launch.preempt import Preemption
    from launch.world import join
    from trainer import sample, train
    from trainer.group import connected
    from trainer.watch import Watch

    task = json.loads(order.read_text())
    if task["fp16"]:  # DeepSpeed refuses fp16 on most CPUs by this check alone
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    world, statuses = join(), []
    with (
        Preemption() as preemption,
        connected(world) as device,
        Watch(world, patience=LIMIT) as watch,
    ):
        tools = {
            "train": (train.parser, partial(train.train, preemption=preemption, watch=watch)),
            "sample": (sample.parser, sample.sample),
        }
        for tool, *arguments in task["runs"]:
            parser, work = tools[tool]
            try:
                status = work(parser().parse_args(arguments), world=world, device=device)
            except ValueError as error:
                status = str(error)
            statuses.append(status)
    if world.is_main:
        Path(task["report"]).write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
