"""Worker processes end with the trainer, and a killed one is one clear error."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from data.dataset import Shards, open_shards
from data.exits import FAILED
from data.stream import Stream, cpu_remark, to_device
from tests.support import ranks
from tests.support.data_streams import config_for


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with suppress(psutil.NoSuchProcess):  # another child has ended meanwhile
            found += [child] if "data.workers" in child.cmdline() else []
    return found


def test_a_killed_worker_is_one_clear_error(whole: Shards) -> None:
    with Stream(whole, config=config_for(whole.root, workers=2), seed=1) as stream:
        batches = stream.batches(images_seen=0, batch_size=12, micro_batch_size=12, rank=0, ranks=1)
        next(batches)
        workers_of(psutil.Process())[0].send_signal(signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"data worker \d .* died with exit status -9"):
            for _ in islice(batches, 1000):
                pass
    assert not workers_of(psutil.Process())


def serve_until_killed(root: Path) -> int:
    """A rank whose first worker is killed in the run."""
    with Stream(open_shards(str(root)), config=config_for(root, workers=2), seed=1) as stream:
        sizes = {"batch_size": 12, "micro_batch_size": 12}
        batches = stream.batches(images_seen=0, rank=0, ranks=1, **sizes)
        served = to_device(batches, device=torch.device("cpu"))
        next(served)
        workers_of(psutil.Process())[0].send_signal(signal.SIGKILL)
        for _ in islice(served, 1000):
            pass
    return 0


def test_a_killed_worker_is_one_line_of_its_rank(whole: Shards, tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(serve_until_killed, whole.root), ranks=1)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED]
    line = r"rank 0 on \S+: error: data worker \d .* died with exit status -9; .* to resume\n"
    assert re.fullmatch(line, job.text), job.text


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one CPU")
def test_workers_that_are_bound_to_the_trainers_cpu_are_named_in_the_log() -> None:
    """By OpenMP as torch is imported, or by a job that has one CPU for each task."""
    script = "import torch; from data.stream import cpu_remark; print(cpu_remark(2), cpu_remark(0))"
    bound = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ranks.ROOT, env=bound, capture_output=True, text=True)
    there = f"data.workers = 2: all share 1 of {os.cpu_count()} CPUs with this rank: "
    assert done.stdout == f"{there}unset OMP_PROC_BIND = 'true' None\n"
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu_remark(2) == f"{there}under Slurm, raise cpus_per_task"
    finally:
        os.sched_setaffinity(0, allowed)


def serve(root: Path, directory: Path) -> int:
    """Take a batch, and when `signalled` is there 40 more; then wait to be killed."""
    with Stream(open_shards(str(root)), config=config_for(root, workers=2), seed=1) as stream:
        batches = stream.batches(images_seen=0, batch_size=4, micro_batch_size=4, rank=0, ranks=1)
        next(batches)
        (directory / "begun").touch()
        ranks.wait_for(directory / "signalled")
        for _ in range(40):
            next(batches)
        (directory / "served").touch()
        signal.pause()
    return 0


def test_workers_outlive_signals_but_not_the_trainer(whole: Shards, tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(serve, whole.root, tmp_path), ranks=1)
    ranks.wait_for(tmp_path / "begun")
    workers = workers_of(psutil.Process(job.ranks[0].pid))
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        workers[0].send_signal(number)
    (tmp_path / "signalled").touch()
    ranks.wait_for(tmp_path / "served")
    job.kill()
    gone, alive = psutil.wait_procs(workers, timeout=ranks.LIMIT)
    assert len(gone) == 2 and not alive
