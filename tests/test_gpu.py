"""On a CUDA device: `pytest -m gpu`. The same properties as elsewhere, where the device matters."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.exits import FAILED
from tests.support import golden, ranks
from trainer.adm import keyed
from trainer.adm.config import UNetConfig
from trainer.adm.unet import UNet
from trainer.watch import forensics
from trainer.watch.pace import Stopwatch

pytestmark = pytest.mark.gpu

FUSED = 'training.kernels = "fused"'
NET = UNetConfig(
    image_size=32, channels=64, channel_mult=(1, 2), blocks=1, attention=(16,), head_channels=32,
    num_classes=10,
)  # fmt: skip


def train(run: Path, tiny: Path, *sets: str, first: str = "pass", status: int = 0) -> str:
    """Train in a process of its own, which does `first`; what it prints."""
    words = [str(tiny), "--run", str(run)]
    for change in sets:
        words += ["--set", change]
    return python(f"{first}; from trainer import train; sys.exit(train.main({words}))", status)


def python(code: str, status: int = 0) -> str:
    """Run code in a process of its own that ends with `status`; what it prints."""
    main = f"from trainer.ranks.ending import run_as_rank; run_as_rank(lambda: exec({code!r}))"
    command = [sys.executable, "-c", f"import sys; {main}"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    done = subprocess.run(
        command, cwd=ranks.ROOT, env=env, text=True, timeout=ranks.LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def test_draws_have_the_same_bits_as_on_the_cpu() -> None:
    numbers = torch.arange(5) + 10**9
    for stream in (keyed.NOISE, keyed.SAMPLE_STEP + 7):
        here = keyed.normal(numbers, seed=3, stream=stream, shape=(3, 8, 8))
        there = keyed.normal(numbers.cuda(), seed=3, stream=stream, shape=(3, 8, 8))
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_net_says_the_same_in_every_precision(dtype: torch.dtype) -> None:
    net = UNet(NET)
    golden.set_formula_weights(net)
    x, t, y = golden.wave("x", (2, 3, 32, 32), 1.0), torch.tensor([7, 803]), torch.tensor([1, 8])
    with torch.no_grad():
        expected = net(x, t, y)
        found = net.to("cuda", dtype)(x.cuda(), t.cuda(), y.cuda()).cpu()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    golden.assert_close(found, expected, tolerance=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_command_trains_and_resumes(tmp_path: Path, tiny: Path, precision: str) -> None:
    change = f'training.precision = "{precision}"'
    assert "finished" in train(tmp_path / "run", tiny, change)
    text = train(tmp_path / "run", tiny, change, "training.images = 128")
    assert "resumes from checkpoint" in text and "finished" in text


@pytest.mark.parametrize(
    ("objective", "sets"),
    [
        ("denoise", ('training.precision = "fp32"',)),
        ("denoise", ('training.precision = "bf16"',)),
        ("denoise", ('training.precision = "fp16"', FUSED, "training.compile = true")),
        ("classify", ('training.precision = "bf16"', FUSED)),
    ],
)
def test_a_deterministic_run_resumes_bit_for_bit(
    tmp_path: Path, tiny: Path, objective: str, sets: tuple[str, ...]
) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(tiny.read_text().replace('"denoise"', f'"{objective}"'))
    sets = (*sets, "training.deterministic = true")
    train(tmp_path / "whole", preset, *sets)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / f"{64:012d}")
    train(tmp_path / "again", preset, *sets)
    for file in (tmp_path / "whole" / "checkpoints" / f"{64:012d}").glob("*.safetensors"):
        other = tmp_path / "again" / "checkpoints" / f"{64:012d}" / file.name
        assert file.read_bytes() == other.read_bytes(), file.name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_sound_gpu_passes_every_audit(tmp_path: Path, tiny: Path, precision: str) -> None:
    sets = ("intervals.audit = 8", "model.dropout = 0.2", f'training.precision = "{precision}"')
    for kernels in ((), (FUSED,)):
        run = tmp_path / f"run-{len(kernels)}"
        assert "finished" in train(run, tiny, *sets, *kernels)
        assert not (run / "incidents.jsonl").exists()


def test_a_flipped_bit_on_a_gpu_is_named(tmp_path: Path, tiny: Path) -> None:
    flip = "from tests.support import faults; faults.flip_a_bit(at=16)"
    text = train(tmp_path / "run", tiny, "intervals.audit = 8", first=flip, status=FAILED)
    assert "hardware fault: rank 0 on " in text and "has other weights than the masters" in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_gpu_is_refused_and_its_image_named(
    tmp_path: Path, tiny: Path, precision: str
) -> None:
    spoil = "from tests.support import faults; faults.spoil({17: float('nan')})"
    train(tmp_path / "run", tiny, f'training.precision = "{precision}"', first=spoil)
    (row,) = map(json.loads, (tmp_path / "run" / "incidents.jsonl").open())
    assert (row["images"], row["worst"][0]["image"]) == (16, 17)
    assert row["replay"] == "the same on two ranks"


def test_a_run_on_a_gpu_shows_what_is_measured_there(
    tmp_path: Path, tiny: Path, digits: Path
) -> None:
    validation = (f'data.validation = "{digits}"', "intervals.validate = 64")
    averages = ("training.ema_widths = [0.1]", "intervals.averages = 64")
    train(tmp_path / "run", tiny, *validation, "data.validation_images = 50", *averages)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for name in ("memory_gib", "forward_seconds", "mfu_measured", "loss/q0"):
        assert any(row.get(name, 0) > 0 for row in rows), name
    assert any("validation/raw/loss" in row for row in rows)
    assert list((tmp_path / "run" / "averages").glob("*/power-0.1.safetensors"))


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


def test_the_last_collectives_of_nccl_are_written(tmp_path: Path) -> None:
    lines = (
        "import torch, pathlib",
        "from trainer.ranks.group import connected, dist",
        "from trainer.ranks.world import join",
        "from trainer.watch import forensics",
        "with connected(join(), patience=60) as device:",
        "    dist.all_reduce(torch.ones(3, device=device))",
        "    torch.cuda.synchronize()",
        f"    forensics.dump(pathlib.Path({str(tmp_path)!r}), rank=0)",
    )
    python("\n".join(lines))
    entries = pickle.loads((tmp_path / "nccl_trace_rank_0").read_bytes())["entries"]
    assert any("all_reduce" in entry["profiling_name"] for entry in entries)
    assert "Thread" in (tmp_path / "stacks_rank_0").read_text()
