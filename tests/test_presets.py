"""Presets: training steps, what they lack, and shards that their packing lines and READMEs make."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from data.packing import options
from trainer import ablate, start
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine import compute

PRESETS = sorted(p.stem for p in configs.PRESETS.glob("*.toml"))
ROWS = {row.name: row for row in ablate.load("paper", (), unset=()).rows}


def step(config: Config) -> None:
    """One training step of a whole network, whose numbers are never computed."""
    training, size = config.training, config.model.image_size
    with torch.device("meta"):
        net = build(config.model).to(compute.DTYPES[training.precision])
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        labels, indices = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    terms = start.build_objective(config)(net, images, labels, indices)
    assert terms["loss"].shape == (2,) and terms["loss"].dtype == torch.float32
    terms["loss"].mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    torch.optim.AdamW(net.parameters(), lr=training.lr, betas=training.betas).step()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_a_training_step(preset: str) -> None:
    step(configs.load(preset))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_papers_tables_takes_a_training_step(row: str) -> None:
    step(ablate.load("paper", (), unset=()).config(ROWS[row]))


@pytest.mark.parametrize("preset", PRESETS)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"it has no settings; `python -m trainer.config NAME` prints a preset$"),
        ("# to come\n", "it has no settings; "),
        ("[model]\nchannels = 3", "setting 'objective' is missing$"),
        ("objectve = 'denoise'", r"unknown setting 'objectve' \(nearest: 'objective'\)$"),
    ],
)
def test_a_preset_that_lacks_its_objective_is_told_what_it_lacks(
    tmp_path: Path, text: str, message: str
) -> None:
    """It was told of a value that it did not have: objective = ''."""
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.toml: {message}"):
        configs.load(tmp_path / "mine.toml")
