"""Worker processes end with the trainer, and a killed one is one clear error."""

import os
import signal
import subprocess
import sys
from itertools import islice

import psutil
import pytest

from data.dataset import Shards
from data.stream import Stream
from tests.support import ranks
from tests.support.data_streams import config_for


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children() if "data.workers" in p.cmdline()]


def test_a_killed_worker_is_one_clear_error(whole: Shards) -> None:
    with Stream(whole, config=config_for(whole.root, workers=2), seed=1) as stream:
        batches = stream.batches(images_seen=0, batch_size=12, micro_batch_size=12, rank=0, ranks=1)
        next(batches)
        workers_of(psutil.Process())[0].send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"data worker \d .* died with exit status -9"):
            for _ in islice(batches, 1000):
                pass
    assert not workers_of(psutil.Process())


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one CPU")
@pytest.mark.parametrize("bound", [{"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}, {}])
def test_workers_that_are_bound_to_one_cpu_are_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, bound: dict[str, str]
) -> None:
    """OpenMP binds a process as torch is imported, and its workers with it."""
    for name, value in bound.items():
        monkeypatch.setenv(name, value)
    bind = "import torch" if bound else "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    script = f"import os; {bind}; from data.stream import cpu_remark; "
    script += "print(cpu_remark(2), cpu_remark(0))"
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    way_out = "unset OMP_PROC_BIND = 'true'" if bound else "under Slurm, raise cpus_per_task"
    there = f"all share 1 of {os.cpu_count()} CPUs with this rank: {way_out}"
    assert said.stdout == f"data.workers = 2: {there} None\n"


def test_workers_outlive_signals_but_not_the_trainer(whole: Shards) -> None:
    script = (
        "import sys\n"
        "from data.dataset import open_shards\n"
        "from data.stream import Stream\n"
        "from tests.support.data_streams import config_for\n"
        "with Stream(open_shards(sys.argv[1]), config=config_for(sys.argv[1], workers=2), seed=1)"
        " as stream:\n"
        "  sizes = {'batch_size': 4, 'micro_batch_size': 4}\n"
        "  for _ in stream.batches(images_seen=0, rank=0, ranks=1, **sizes):\n"
        "    print('served', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, whole.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as trainer:
        assert trainer.stdin and trainer.stdout
        assert trainer.stdout.readline() == b"served\n"
        workers = workers_of(psutil.Process(trainer.pid))
        assert len(workers) == 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            workers[0].send_signal(number)
        for _ in range(40):
            trainer.stdin.write(b"\n")
            trainer.stdin.flush()
            assert trainer.stdout.readline() == b"served\n"
        trainer.kill()
    gone, alive = psutil.wait_procs(workers, timeout=ranks.LIMIT)
    assert len(gone) == 2 and not alive
