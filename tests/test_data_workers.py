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

from data import pool
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
def test_workers_that_are_bound_to_the_trainers_cpu_are_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By OpenMP as torch is imported, by a job that has one CPU for each task, or by MPI."""
    script = "import torch; from data.stream import cpu_remark; print(cpu_remark(2), cpu_remark(0))"
    bound = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ranks.ROOT, env=bound, capture_output=True, text=True)
    there = f"data.workers = 2: all share 1 of {os.cpu_count()} CPUs with this rank: "
    assert done.stdout == f"{there}unset OMP_PROC_BIND = 'true' None\n"
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu_remark(2) == f"{there}raise cpus_per_task of Slurm, or a container's limit"
        monkeypatch.setenv("PMI_RANK", "0")
        said = f"{there}give mpirun --bind-to none (Intel's: I_MPI_PIN=off), or raise cpus_per_task"
        assert (cpu_remark(2) or "").startswith(said)
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


def test_there_is_a_worker_for_each_cpu_that_a_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert pool.cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "765000 100000"}, 7),
        ("0::/pod/one", {"pod/one/cpu.max": "max 100000", "pod/cpu.max": "50000 100000"}, 1),
        ("4:memory:/m\n3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000"}, 4),
        ("3:cpu,cpuacct:/kubepods/pod", {"cpu/cpu.cfs_quota_us": "-1"}, 64),
        ("", {}, 64),
    ],
)
def test_a_containers_limit_on_cpu_time_is_a_number_of_cpus(
    own: str,
    limits: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With Docker and Kubernetes each process sees all CPUs of the node."""
    (tmp_path / "own").write_text(own)
    for name, text in {**limits, "cpu/cpu.cfs_period_us": "100000"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(pool, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(pool, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert pool.cpus() == expected
