"""`--init`: from which files a run starts, what is refused, and what the run records of it."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.dataset import Shards, open_shards
from tests.support.classes import folder, packed
from tests.support.runs import HALF, STEP, Place, build_start, equal
from trainer import initial as initials
from trainer import weights as files
from trainer.adm.config import UNetConfig
from trainer.config import experiment as configs
from trainer.diffusers_format import to_diffusers
from trainer.initial import Initial
from trainer.networks import TrainedNetwork
from trainer.run.directory import Run

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
    torch.save({**formula, "out.2.bias": torch.zeros(6).to(torch.float8_e4m3fn)}, tmp_path / "8.pt")
    torch.save({"state_dict": formula, "args": Namespace(lr=1)}, tmp_path / "args.pt")
    said = {
        "8.pt": "out.2.bias is in torch.float8_e4m3fn: weights must be in float32, float16, bf",
        "args.pt": r"holds a argparse.Namespace, .* torch.save\(found\['state_dict'\], 'w.pt'\)",
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
    with pytest.raises(ValueError, match="--init-skip label: neither the network nor"):
        find(tmp_path / "ten.pt", tiny, "label", sets=seven)
    initial = find(tmp_path / "ten.pt", tiny, "label_emb", sets=seven)
    assert str(initial).endswith("; without label_emb)")
    loaded = initial.load(configs.load(tiny, seven))
    assert loaded.pop("label_emb.weight").shape[0] == 7
    assert equal(loaded, {k: v for k, v in formula.items() if k != "label_emb.weight"})


def test_classes_that_start_from_others_are_named_as_far_as_names_are_known(
    tmp_path: Path, tiny: Path, digits: Path, formula: dict[str, Tensor]
) -> None:
    """As many classes with other names took those of the weights without a word."""
    same, few = open_shards(digits), ("model.num_classes = 10",)
    names = ("red", *same.classes[1:])
    others = packed(folder(tmp_path / "images", tuple(f"{name}/a.png" for name in names)))
    config = configs.load(tiny)
    files.save(tmp_path / "a.safetensors", formula, metadata={"config": configs.to_toml(config)})
    torch.save(formula, tmp_path / "a.pt")

    def said(name: str, shards: Shards, *skip: str) -> list[str]:
        return initials.remarks(find(tmp_path / name, tiny, *skip, sets=few), shards=shards)

    assert said("a.safetensors", same) == said("a.safetensors", others, "label_emb") == []
    part = replace(same, classes=same.classes[:7])  # 0 to 6, as of a network with spare classes
    assert said("a.safetensors", part) == said("a.pt", others, "label_emb") == []
    assert initials.remarks(None, shards=others) == []
    (line,) = said("a.safetensors", others)
    first = next(i for i, name in enumerate(others.classes) if name != same.classes[i])
    differ = f"its class {first} is '{first}', that of {others.where} '{others.classes[first]}'"
    assert differ in line and line.endswith("from the seed, add --init-skip label_emb")
    (line,) = said("a.pt", others)
    assert f"does not name its classes: class 0, '{others.classes[0]}', starts from its" in line


def test_what_a_network_has_no_place_for_is_left_out_by_request(
    tmp_path: Path, tiny: Path, formula: dict[str, Tensor]
) -> None:
    torch.save(formula | {"step": torch.zeros(1)}, tmp_path / "more.pt")
    message = "step is unknown; to leave step out, add --init-skip step$"
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "more.pt", tiny)
    loaded = find(tmp_path / "more.pt", tiny, "step").load(configs.load(tiny))
    assert equal(loaded, formula)
    plain = configs.load(tiny, unset=["model.num_classes"])
    message = "to leave label_emb out and leave step out, add --init-skip label_emb step$"
    with pytest.raises(ValueError, match=message):
        Initial.find(tmp_path / "more.pt", skip=(), config=plain)
    initial = Initial.find(tmp_path / "more.pt", skip=("step", "label_emb"), config=plain)
    assert initial.load(plain).keys() == formula.keys() - {"label_emb.weight"}


@pytest.mark.parametrize("file", ["unet/a.safetensors", "unet/a.bin", "a.safetensors", "a.bin"])
def test_weights_by_diffusers_names_start_a_run_and_are_of_the_network_or_refused(
    tmp_path: Path, tiny: Path, formula: dict[str, Tensor], file: str
) -> None:
    config = configs.load(tiny)
    assert isinstance(config.model, UNetConfig)
    path = tmp_path / file.replace("a.", "diffusion_pytorch_model.")
    path.parent.mkdir(exist_ok=True)
    theirs = to_diffusers(formula, config=config.model)
    theirs = {name: value.contiguous() for name, value in theirs.items()}
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(theirs, path)
    assert equal(find(tmp_path, tiny).load(config), formula)
    assert equal(TrainedNetwork.find(tmp_path, preset=str(tiny), decay=None).weights(), formula)
    for sets, message in [
        (("model.attention = []",), r"attentions\.0\.\S+ is unknown"),
        (("model.channels = 96",), r"is \[128, 32\] instead of \[384, 96\]"),
        (("model.channels = 96", "model.heads = 3"), "qkv.weight is missing"),
    ]:
        with pytest.raises(ValueError, match=f"does not fit the network of this preset.*{message}"):
            find(tmp_path, tiny, sets=sets)
    for classes in (False, True):  # of the weights, and then of the network
        part = "label_emb" if classes else "class_embedding"
        unset = ["model.num_classes"] if classes else []
        if not classes:
            save({n: v for n, v in theirs.items() if not n.startswith(part)}, path)
        else:
            save(theirs, path)
        other = configs.load(tiny, unset=unset)
        with pytest.raises(ValueError, match=r"add --init-skip label_emb$"):
            Initial.find(tmp_path, skip=(), config=other)
        assert Initial.find(tmp_path, skip=("label_emb",), config=other).load(other)


def test_a_run_starts_from_weights_of_any_origin_and_records_them(
    place: Place, tmp_path: Path, digits: Path, formula: dict[str, Tensor]
) -> None:
    file = tmp_path / "w.pt"
    torch.save(formula, file)
    checkpoint = place.run("2x2") / "checkpoints" / f"{HALF:012d}"
    averages = load_file(checkpoint / "ema-0.5.safetensors")
    origins = {"by-run": place.run("2x2"), "by-checkpoint": checkpoint, "by-file": file}
    runs = [
        [*place.arguments(name, stage=stage, sets=ONE), "--init", str(origin)]
        for stage, (name, origin) in enumerate(origins.items(), 1)
    ]
    beside = shutil.copytree(digits, tmp_path / "beside") / "zz.tar"
    beside.touch()
    skip = place.arguments("skipped", sets=(*ONE, f"data.shards = '{beside.parent}'"))
    skip += ["--init", str(file), "--init-skip", "label_emb"]
    assert place.train(*runs, skip, world=2) == [0] * 4
    newest = sorted((place.run("2x2") / "checkpoints").iterdir())[-1]
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
    assert "; without label_emb)" in place.log("skipped")
    logs = {name for name in expected if "1 tar is not in manifest.json and" in place.log(name)}
    assert logs == {"skipped"}
    assert "w.pt does not name its classes: class 0, '0', starts from" in place.log("by-file")
    assert not any("name its classes" in place.log(name) for name in expected.keys() - {"by-file"})
    _resume(place, file)


def _resume(place: Place, file: Path) -> None:
    """The same command resumes, also without its file; other weights are refused."""
    file.rename(file.with_suffix(".gone"))
    more = (*ONE[1:], f"training.images = {2 * STEP}")
    words = place.arguments("by-file", stage=1, sets=more)
    other = [*words, "--init", str(place.run("2x2"))]
    skipped = [*words, "--init", str(file), "--init-skip", "label_emb"]
    unknown = [*place.arguments("2x2", sets=more), "--init", str(file)]
    statuses = place.train([*words, "--init", str(file)], other, skipped, unknown, world=2)
    assert statuses[0] == 0 and f"resumes from checkpoint {STEP:012d}" in place.log("by-file")
    for status in statuses[1:3]:
        assert f"was started with --init {file}: leave --init out to resume it" in status
    assert "2x2 was started from its seed and has a checkpoint: leave --init out" in statuses[3]


def test_an_init_that_came_to_nothing_is_forgotten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    initials.record(Initial(init="a", file="a", sha256="0"), run=run)
    initials.record(None, run=run)
    kept = json.loads((tmp_path / "init.json").read_text())
    assert kept == {"format": "run-init-1", "init": None}
