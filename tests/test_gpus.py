"""On two CUDA devices or more: `pytest -m gpu`, some minutes.

What one device and gloo's ranks do elsewhere, over NCCL. All runs are trained at the same time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"),
]

END = 64
DETERMINISTIC = ("training.deterministic = true",)
SIXTEEN = (
    'training.precision = "fp16"', 'training.kernels = "fused"', "training.compile = true",
    *DETERMINISTIC,
)  # fmt: skip
#: Ranks, changes of ds_config.json's zero_optimization, and settings of each run.
RUNS = {
    "one": (1, {"stage": 2}, ()),
    **{f"stage-{stage}": (2, {"stage": stage}, ()) for stage in (1, 2, 3)},
    "all": (GPUS, {"stage": 2}, (f"training.batch = {8 * GPUS}", f"training.images = {80 * GPUS}")),
    "resumed": (2, {"stage": 2}, ("training.images = 32",)),
    # With many buckets, and parameters that fit into none.
    **{
        f"16-{stage}-{aside}": (
            2, {"stage": stage, "overlap_comm": aside, "reduce_bucket_size": 60_000}, SIXTEEN
        )
        for stage in (1, 2)
        for aside in (False, True)
    },
}  # fmt: skip


def start(count: int, *words: str | Path) -> subprocess.Popen:
    """Start a module on so many ranks, by torchrun; the module's name is the first word."""
    own = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", f"{count}", "-m", "--", *map(str, words)),
        ],
        cwd=ranks.ROOT,
        env={k: v for k, v in os.environ.items() if k not in own},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """The status of a job and what it printed, once it has ended."""
    text, _ = process.communicate(timeout=ranks.LIMIT)
    return process.returncode, text


class Runs:
    """The runs in `root`."""

    def __init__(self, root: Path, preset: Path) -> None:
        self.root, self._preset = root, preset

    def train(
        self, name: str, count: int, zero: dict, *sets: str, patience: int = 600
    ) -> subprocess.Popen:
        table = json.loads((ranks.ROOT / "ds_config.json").read_text())
        file = self.root / f"{name}.json"
        file.write_text(
            json.dumps(table | {"zero_optimization": {**table["zero_optimization"], **zero}})
        )
        words = [word for change in sets for word in ("--set", change)]
        options = ("--run", self.root / name, "--ds-config", file, "--patience", patience)
        return start(count, "trainer.train", self._preset, *map(str, options), *words)

    def state(self, name: str, images: int = END) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint, by file."""
        found = sorted((self.root / name / f"checkpoints/{images:012d}").glob("*.safetensors"))
        assert len(found) == 5  # weights, two averages and two moments
        return {file.name: load_file(file) for file in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("gpus"), tiny)
    jobs = {name: made.train(name, n, zero, *sets) for name, (n, zero, sets) in RUNS.items()}
    for name, job in jobs.items():
        status, text = end(job)
        assert status == 0, f"{name}: {text}"
    return made


def assert_close(one: dict, other: dict, *, by: float = 1e-3) -> None:
    """Sums of gradients have another order. Adam makes much of a gradient that is near zero."""
    assert one.keys() == other.keys()
    for file, tensors in one.items():
        flat, compared = (
            torch.cat([t.flatten().double() for t in each.values()])
            for each in (tensors, {name: other[file][name] for name in tensors})
        )
        off = ((flat - compared).norm() / flat.norm()).item()
        assert off <= by, f"{file}: {off}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_train_what_one_does(runs: Runs, stage: int) -> None:
    assert_close(runs.state("one"), runs.state(f"stage-{stage}"))


def test_a_run_of_two_gpus_resumes_on_one_in_another_stage(runs: Runs) -> None:
    status, text = end(runs.train("resumed", 1, {"stage": 1}))
    assert status == 0, text
    assert_close(runs.state("one"), runs.state("resumed"))


def test_all_gpus_of_this_machine_train_together(runs: Runs) -> None:
    rows = [json.loads(line) for line in (runs.root / "all" / "metrics.jsonl").open()]
    assert rows[-1]["images"] == 80 * GPUS and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reduced_beside_the_backward_pass_are_the_same(runs: Runs, stage: int) -> None:
    after, aside = runs.state(f"16-{stage}-False"), runs.state(f"16-{stage}-True")
    assert_close(after, aside, by=0.0)


def test_two_gpus_draw_the_images_of_one(runs: Runs) -> None:
    files = {count: runs.root / f"drawn-{count}.npz" for count in (1, 2)}
    options = ("--images", "50", "--batch", "10", "--steps", "10")
    jobs = [
        start(n, "trainer.sample", runs.root / "one", "--out", file, *options)
        for n, file in files.items()
    ]
    for job in jobs:
        status, text = end(job)
        assert status == 0, text
    one, two = (np.load(files[count]) for count in (1, 2))
    assert (one["arr_1"] == two["arr_1"]).all()
    off = np.abs(one["arr_0"].astype(int) - two["arr_0"])
    assert off.max() <= 2 and (off > 0).mean() < 0.01


def test_a_rank_that_hangs_ends_the_job_and_is_named(runs: Runs) -> None:
    job = runs.train("hangs", 2, {"stage": 2}, "training.images = 80_000_000", patience=30)
    metrics, limit = runs.root / "hangs" / "metrics.jsonl", time.monotonic() + ranks.LIMIT
    while not metrics.exists():
        assert job.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (second,) = (
        int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(second, signal.SIGSTOP)
    status, text = end(job)
    assert status != 0, text
    log = (runs.root / "hangs" / "log.txt").read_text()
    assert "(rank 1; " in log, log
