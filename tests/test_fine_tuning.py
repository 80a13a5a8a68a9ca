"""`--init`: from which files a run starts, what is refused, and what the run records of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.runs import HALF, STEP, Place, build_start, equal
from trainer import config as configs
from trainer import initial as initials
from trainer import weights as files
from trainer.initial import Initial
from trainer.run import Run

ONE = (f"training.images = {STEP}", f"intervals.checkpoint = {STEP}", "training.lr = 1e-30")


@pytest.fixture
def formula(weights: dict[str, list[str]]) -> dict[str, Tensor]:
    """Weights of the tiny preset's network."""
    return files.load(weights["unet"][0])


def find(file: Path, tiny: Path, *skip: str, sets: tuple[str, ...] = ()) -> Initial:
    return Initial.find(file, skip=skip, config=configs.load(tiny, sets))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_wrappers_around_a_network_leave_no_trace(
    tmp_path: Path, formula: dict[str, Tensor], prefix: str
) -> None:
    named = {prefix + name: value for name, value in formula.items()}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "a.pt")
    torch.save(named, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file(named, tmp_path / "c.safetensors")
    for file in sorted(tmp_path.iterdir()):
        assert equal(files.load(file), formula)


def test_files_that_no_run_can_start_from_are_one_line(
    tmp_path: Path, tiny: Path, formula: dict[str, Tensor]
) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"state_dict": 3, "step": 5}, tmp_path / "other.pt")
    broken = {**formula, "out.2.bias": torch.full((6,), float("nan"))}
    torch.save(broken, tmp_path / "nan.pt")
    torch.save({"out.2.bias": torch.zeros(6)}, tmp_path / "short.pt")
    torch.save({"model": formula, "ema": formula, "args": 3}, tmp_path / "several.pt")
    said = {
        "none.pt": "no such weights file",
        "empty.pt": "it is empty",
        "empty.safetensors": "it is empty",
        "text.pt": "is no",
        "other.pt": "not a dict of tensors",
        "several.pt": r"holds \['model', 'ema', 'args'\] \(.*several.pt'\)\['ema'\], 'w.pt'\)\)",
        "nan.pt": "out.2.bias has values that are not finite",
        "short.pt": "does not fit the network of this preset",
    }
    for name, message in said.items():
        with pytest.raises(ValueError, match=message) as raised:
            find(tmp_path / name, tiny)
        assert len(str(raised.value).splitlines()) == 1 and name in str(raised.value)


def test_another_number_of_classes_starts_from_the_seed_by_request(
    tmp_path: Path, tiny: Path, formula: dict[str, Tensor]
) -> None:
    torch.save(formula, tmp_path / "ten.pt")
    seven = ("model.num_classes = 7",)
    with pytest.raises(ValueError, match=r"label_emb\.weight is .*10.* add --init-skip label_emb$"):
        find(tmp_path / "ten.pt", tiny, sets=seven)
    with pytest.raises(ValueError, match="--init-skip label: the network has no such part"):
        find(tmp_path / "ten.pt", tiny, "label", sets=seven)
    initial = find(tmp_path / "ten.pt", tiny, "label_emb", sets=seven)
    assert str(initial).endswith("; label_emb from the seed)")
    loaded = initial.load(configs.load(tiny, seven))
    assert loaded.pop("label_emb.weight").shape[0] == 7
    assert equal(loaded, {k: v for k, v in formula.items() if k != "label_emb.weight"})


def test_a_run_starts_from_weights_of_any_origin_and_records_them(
    place: Place, tmp_path: Path, formula: dict[str, Tensor]
) -> None:
    file = tmp_path / "w.pt"
    torch.save(formula, file)
    checkpoint = place.run("2x2") / "checkpoints" / f"{HALF:012d}"
    averages = load_file(checkpoint / "ema-0.5.safetensors")
    origins = {"by-run": place.run("3x1"), "by-checkpoint": checkpoint, "by-file": file}
    runs = [
        [*place.arguments(name, stage=stage, sets=ONE), "--init", str(origin)]
        for stage, (name, origin) in enumerate(origins.items(), 1)
    ]
    skip = [*place.arguments("skipped", sets=ONE), "--init", str(file), "--init-skip", "label_emb"]
    assert place.train(*runs, skip, world=2) == [0] * 4
    newest = sorted((place.run("3x1") / "checkpoints").iterdir())[-1]
    expected = {
        "by-run": load_file(newest / "ema-0.5.safetensors"),
        "by-checkpoint": averages,
        "by-file": formula,
        "skipped": {**formula, "label_emb.weight": build_start(place)["label_emb.weight"]},
    }
    for name, weights in expected.items():
        assert all(
            torch.allclose(value, weights[key]) for key, value in place.weights(name, STEP).items()
        )
        record = json.loads((place.run(name) / "init.json").read_text())
        assert f"starts from {record['file']} (sha256 {record['sha256'][:12]}" in place.log(name)
    assert "; label_emb from the seed)" in place.log("skipped")
    _resume(place, file)


def _resume(place: Place, file: Path) -> None:
    """The same command resumes, also without its file; other weights are refused."""
    file.rename(file.with_suffix(".gone"))
    more = (*ONE[1:], f"training.images = {2 * STEP}")
    words = place.arguments("by-file", stage=1, sets=more)
    other = [*words, "--init", str(place.run("3x1"))]
    skipped = [*words, "--init", str(file), "--init-skip", "label_emb"]
    unknown = [*place.arguments("3x1", sets=more), "--init", str(file)]
    statuses = place.train([*words, "--init", str(file)], other, skipped, unknown, world=2)
    assert statuses[0] == 0 and f"resumes from checkpoint {STEP:012d}" in place.log("by-file")
    for status in statuses[1:3]:
        assert f"was started with --init {file}: leave --init out to resume it" in status
    assert "3x1 was started from its seed and has a checkpoint: leave --init out" in statuses[3]


def test_an_init_that_came_to_nothing_is_forgotten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    initials.record(Initial(init="a", file="a", sha256="0"), run=run)
    assert initials.recorded(run) == Initial(init="a", file="a", sha256="0")
    initials.record(None, run=run)
    assert initials.recorded(run) is None
