"""Presets name shards that their own packing lines, and the READMEs, make."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from data.packing import options
from trainer import compute
from trainer import config as configs


@pytest.mark.parametrize("preset", sorted(p.stem for p in configs.PRESETS.glob("*.toml")))
def test_a_preset_says_how_its_shards_are_packed(preset: str) -> None:
    data = configs.load(preset).data
    lines = (configs.PRESETS / f"{preset}.toml").read_text().splitlines()
    command = lines[lines.index(f'shards = "{data.shards}"') - 1]
    assert command.startswith("# python -m data.pack ")
    packing = options.parser().parse_args(shlex.split(command)[4:])
    assert str(packing.out) == data.shards
    assert packing.keep_original == (data.crop == "random")
    assert packing.size >= data.image_size and (packing.keep_original or data.crop == "center")


def test_the_shards_of_the_readmes_are_those_of_presets() -> None:
    known = {configs.load(p.stem).data.shards for p in configs.PRESETS.glob("*.toml")}
    text = "".join(Path(name, "README.md").read_text() for name in (".", "data", "launch"))
    named = set(re.findall(r"data\.pack \S+/train (\S+)", text))
    assert named and named <= known


def test_fp16_on_a_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    training = configs.load("imagenet64").training
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        said = [line for line in compute.remarks(training, stage=2) if "50 times slower" in line]
        assert len(said) == (not gpu)
