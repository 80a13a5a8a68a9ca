"""On a CUDA device: `pytest -m gpu`, under two minutes.

The same properties as elsewhere, where the device matters. Four processes, started together, do
all the training; what a process does not report fails the tests that need it.
"""

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.exits import FAILED
from tests.support import faults, ranks
from trainer.engine import determinism
from trainer.ranks.process_group import connected
from trainer.ranks.world import join
from trainer.watch import forensics
from trainer.watch.pace import Stopwatch

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp32", "bf16", "fp16")
FUSED = 'training.kernels = "fused"'
#: Runs that are cut in two halves and are not, by name.
DETERMINISTIC = {
    "fp32": ('training.precision = "fp32"',),
    "bf16": ('training.precision = "bf16"',),
    "compiled": ('training.precision = "fp16"', FUSED, "training.compile = true"),
    "classify": ('training.precision = "bf16"', FUSED),
}


def of(precision: str) -> str:
    return f'training.precision = "{precision}"'


class Processes:
    """Processes that each train runs one after the other, in `root`, all at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._started: dict[str, subprocess.Popen] = {}
        self._ended: dict[str, tuple[int, str]] = {}

    def start(self, name: str, *runs: list[str], first: Callable[[], object] = bool) -> None:
        """Train `runs`, arguments of `trainer.train` each, in a process that does `first`."""
        where = self.root / f"job-{name}"
        where.mkdir()
        words = [["train", *run] for run in runs]
        self._started[name] = start(partial(work, first, where, words))

    def arguments(self, run: str, preset: Path, *sets: str) -> list[str]:
        return [
            str(preset), "--run", str(self.root / run), *(w for s in sets for w in ("--set", s))
        ]  # fmt: skip

    def end(self, name: str) -> tuple[int, str]:
        """The status of a process and what it printed, once it has ended."""
        if name not in self._ended:
            text, _ = self._started[name].communicate(timeout=ranks.LIMIT)
            self._ended[name] = (self._started[name].returncode, text)
        return self._ended[name]

    def check(self, name: str) -> None:
        """Wait for a process, all of whose runs must have gone well."""
        status, text = self.end(name)
        report = self.root / f"job-{name}" / "report.json"
        assert status == 0 and report.exists(), text
        assert set(json.loads(report.read_text())) == {0}, text


def work(first: Callable[[], object], directory: Path, runs: list[list[str]]) -> int:
    """Do `first`, and then the runs, as one rank alone."""
    first()
    return ranks.work(directory, runs, False)


def start(task: Callable[[], int]) -> subprocess.Popen:
    """Do a task as a rank that sees the device, in a process of its own."""
    main = (
        "import pickle; from trainer.ranks.ending import run_as_rank; "
        f"run_as_rank(pickle.loads({pickle.dumps(task)!r}))"
    )
    command = [sys.executable, "-c", main]
    own = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")
    env = {k: v for k, v in os.environ.items() if k not in own}
    return subprocess.Popen(
        command, cwd=ranks.ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path, digits: Path) -> Processes:
    root = tmp_path_factory.mktemp("gpu")
    done, audited = Processes(root), ("intervals.audit = 8", "model.dropout = 0.2")
    runs = []
    for precision in PRECISIONS:
        for name, kernels in (("plain", ()), ("fused", (FUSED,))):
            runs.append(
                done.arguments(f"{name}-{precision}", tiny, *audited, of(precision), *kernels)
            )
        more = ("training.images = 128", of(precision), *audited)
        runs.append(done.arguments(f"plain-{precision}", tiny, *more))
    measured = (
        f'data.validation = "{digits}"', "intervals.validate = 64", "data.validation_images = 50",
        "training.ema_widths = [0.1]", "intervals.averages = 64",
    )  # fmt: skip
    runs.append(done.arguments("measured", tiny, *measured))
    done.start("plain", *runs, first=partial(faults.note_waits, 16))
    classifier = root / "classifier.toml"
    classifier.write_text(tiny.read_text().replace('"denoise"', '"classify"'))
    runs = []
    for name, sets in DETERMINISTIC.items():
        preset, sets = tiny if name != "classify" else classifier, (*sets, _DETERMINISTIC)
        runs.append(done.arguments(f"{name}-whole", preset, *sets))
        for half in ("training.images = 32",), ():
            runs.append(done.arguments(f"{name}-again", preset, *sets, *half))
    table = json.loads((ranks.ROOT / "ds_config.json").read_text())
    for stage in (1, 2):  # with many buckets, and parameters that fit into none
        own = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 60_000}
        (root / f"{stage}.json").write_text(
            json.dumps(table | {"zero_optimization": {**table["zero_optimization"], **own}})
        )
        sets = (*DETERMINISTIC["compiled"], _DETERMINISTIC)
        aside = done.arguments(f"compiled-aside-{stage}", tiny, *sets)
        runs.append([*aside, "--ds-config", str(root / f"{stage}.json")])
    # cuBLAS reads its settings once.
    first = partial(determinism.prepare, str(tiny), [_DETERMINISTIC], unset=())
    done.start("deterministic", *runs, first=first)
    spoiled = [done.arguments(f"spoiled-{p}", tiny, of(p)) for p in ("fp32", "bf16")]
    done.start("spoiled", *spoiled, first=partial(faults.spoil, {17: math.nan}))
    flipped = done.arguments("flipped", tiny, "intervals.audit = 8")
    done.start("flipped", flipped, first=partial(faults.flip_a_bit, at=16))
    return done


_DETERMINISTIC = "training.deterministic = true"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_trains_and_resumes_and_passes_every_audit(
    trained: Processes, precision: str
) -> None:
    trained.check("plain")
    for run, images in ((f"plain-{precision}", 128), (f"fused-{precision}", 64)):
        state = json.loads((trained.root / run / "launch/state.json").read_text())
        assert (state["state"], state["images_seen"]) == ("finished", images)
        assert not (trained.root / run / "incidents.jsonl").exists()


@pytest.mark.parametrize("run", ["plain-fp32", "plain-fp16", "fused-fp16", "fused-bf16"])
def test_a_step_waits_for_the_device_once(trained: Processes, run: str) -> None:
    trained.check("plain")
    assert len(json.loads((trained.root / run / "waits.json").read_text())) == 1


def state(trained: Processes, run: str) -> dict[str, bytes]:
    """The tensors of a run's last checkpoint, by file."""
    end = trained.root / f"{run}/checkpoints/{64:012d}"
    return {file.name: file.read_bytes() for file in end.glob("*.safetensors")}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_run_resumes_bit_for_bit(trained: Processes, name: str) -> None:
    trained.check("deterministic")
    whole, again = (state(trained, f"{name}-{how}") for how in ("whole", "again"))
    assert whole and not [file for file in whole if whole[file] != again.get(file)]


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reduced_beside_the_backward_pass_are_the_same(
    trained: Processes, stage: int
) -> None:
    trained.check("deterministic")
    whole, aside = state(trained, "compiled-whole"), state(trained, f"compiled-aside-{stage}")
    assert whole and not [file for file in whole if whole[file] != aside.get(file)]


def test_a_flipped_bit_on_a_gpu_is_named(trained: Processes) -> None:
    status, text = trained.end("flipped")
    assert status == FAILED, text
    assert "hardware fault: rank 0 on " in text and "has other weights than the masters" in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_gpu_is_refused_and_its_image_named(trained: Processes, precision: str) -> None:
    trained.check("spoiled")
    run = trained.root / f"spoiled-{precision}"
    (row,) = map(json.loads, (run / "incidents.jsonl").open())
    assert (row["images"], row["worst"][0]["image"]) == (16, 17)
    assert row["replay"] == "the same on two ranks"


def test_a_run_on_a_gpu_shows_what_is_measured_there(trained: Processes) -> None:
    trained.check("plain")
    run = trained.root / "measured"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    for name in ("memory_gib", "forward_seconds", "mfu_measured", "loss/q0"):
        assert any(row.get(name, 0) > 0 for row in rows), name
    assert any("validation/raw/loss" in row for row in rows)
    assert list((run / "averages").glob("*/power-0.1.safetensors"))


def test_forward_times_are_the_device_s(tmp_path: Path) -> None:
    watch, x = Stopwatch(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    seconds = []
    for count in (1, 1, 50):  # the first one loads the kernel
        with watch.running():
            for _ in range(count):
                x @ x
        seconds.append(watch.read())
    assert seconds[2] > 10 * seconds[1] > 0
    assert watch.read() == 0.0


def test_memory_that_runs_out_leaves_a_snapshot(tmp_path: Path) -> None:
    held = torch.ones(1230, 4570, device="cuda")
    with (
        pytest.raises(torch.OutOfMemoryError),
        forensics.out_of_memory_kept(tmp_path, rank=0),
    ):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    snapshot = pickle.loads((tmp_path / "memory_rank_0.pickle").read_bytes())
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) >= held.nbytes
    text = (tmp_path / "memory_rank_0.txt").read_text()
    assert "x cuda:0 torch.float32 (1230, 4570)" in text and "Tried to allocate" in text


def reduce_and_dump(directory: Path) -> int:
    with connected(join(), patience=60) as device:
        dist.all_reduce(torch.ones(3, device=device))
        torch.cuda.synchronize()
        forensics.dump(directory, rank=0)
    return 0


def test_the_last_collectives_of_nccl_are_written(tmp_path: Path) -> None:
    process = start(partial(reduce_and_dump, tmp_path))
    text, _ = process.communicate(timeout=ranks.LIMIT)
    assert process.returncode == 0, text
    entries = pickle.loads((tmp_path / "nccl_trace_rank_0").read_bytes())["entries"]
    assert any("all_reduce" in entry["profiling_name"] for entry in entries)
    assert "in dump" in (tmp_path / "stacks_rank_0").read_text()
