"""On a CUDA device: `pytest -m gpu`. The same properties as elsewhere, where the device matters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import golden, ranks
from trainer.adm import keyed
from trainer.adm.config import UNetConfig
from trainer.adm.unet import UNet

pytestmark = pytest.mark.gpu

NET = UNetConfig(
    image_size=32, channels=64, channel_mult=(1, 2), blocks=1, attention=(16,), head_channels=32,
    num_classes=10,
)  # fmt: skip


def train(run: Path, tiny: Path, *sets: str) -> str:
    command = [sys.executable, "-m", "trainer.train", str(tiny), "--run", str(run)]
    for change in sets:
        command += ["--set", change]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    done = subprocess.run(
        command, cwd=ranks.ROOT, env=env, text=True, timeout=ranks.LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_resumes_bit_for_bit(
    tmp_path: Path, tiny: Path, precision: str
) -> None:
    sets = (f'training.precision = "{precision}"', "training.deterministic = true")
    train(tmp_path / "whole", tiny, *sets)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / f"{64:012d}")
    train(tmp_path / "again", tiny, *sets)
    for file in (tmp_path / "whole" / "checkpoints" / f"{64:012d}").glob("*.safetensors"):
        other = tmp_path / "again" / "checkpoints" / f"{64:012d}" / file.name
        assert file.read_bytes() == other.read_bytes(), file.name
