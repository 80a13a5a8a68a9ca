"""What a sampling request may not be given: each is refused in one line before drawing."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.pack import pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from tests.support import ranks
from tests.support.data_fixtures import image_file
from trainer import sample
from trainer.adm.unet import build
from trainer.classes import difference
from trainer.config import experiment as configs
from trainer.ema import find
from trainer.networks import TrainedNetwork
from trainer.sampling.inputs import SampleInputs, check_names
from trainer.sampling.parts import DrawJob
from trainer.sampling.requests import base_jobs, enlarging_job


def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, weights: dict[str, list[str]], nets: dict[str, list[str]]
) -> None:
    out = ["--out", tmp_path / "never.npz", "--images", "2"]
    guide = weights["guide"]
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a tensor in sight")
    statuses = ranks.sample(
        tmp_path,
        [*weights["unet"], *out, "--classes", "10"],
        [*weights["unet"], *out, "--steps", "2000"],
        [*weights["unet"], *out, "--low-res", foreign],
        [weights["unet"][0], *out],
        [guide[1], "--preset", guide[3], *out],
        [guide[1], *weights["unet"][1:], *out],
        [foreign, *weights["unet"][1:], *out],
        [tmp_path / "norun", *out],
        [*weights["unet"], *out, "--classifier", *weights["unet"][:1], "--classifier-preset",
         weights["unet"][2]],
        [*weights["unet"], *out, *guide, "--scale", "0.5,0.50000001"],
        [*nets["base"], *out, "--upsampler", nets["base"][0], *nets["and"][2:4]],
    )  # fmt: skip
    expected = [
        "10 is not among the classes 0 to 9",
        "2000",
        "is no upsampler: leave out --low-res",
        "add --preset",
        "is a classifier; give it as --classifier",
        "does not fit the network of this preset",
        "weights file",
        "norun",
        "is no classifier",
        "two outputs would be",
        "does not fit the network of this preset",
    ]
    for status, message in zip(statuses, expected, strict=True):
        assert message in str(status) and len(str(status).splitlines()) == 1
    assert not list(tmp_path.glob("never*"))


def test_a_classifier_of_other_classes_or_noise_is_refused_before_drawing(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    like = Path(weights["guide"][3]).read_text()
    steps = 'schedule = "cosine"\nsteps = 500'
    noise = ('schedule = "cosine"', 'schedule = "linear"')
    others = {
        "fewer": like.replace("num_classes = 10", "num_classes = 4"),
        "more": like.replace("num_classes = 10", "num_classes = 12"),
        "noise": like.replace(*noise),
        "steps": like.replace(noise[0], steps),
        "both": like.replace(noise[0], steps).replace(*noise),
    }
    ask = [*weights["unet"], "--images", "10", "--steps", "2"]
    runs: list[list] = []
    for name, text in others.items():
        preset = tmp_path / f"{name}.toml"
        preset.write_text(text)
        net = build(configs.load(preset).model)
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
        guide = ["--classifier", tmp_path / f"{name}.safetensors", "--classifier-preset", preset]
        runs.append([*ask, *guide, "--out", tmp_path / f"{name}.npz"])
    free = tmp_path / "free.toml"
    free.write_text(Path(weights["unet"][2]).read_text().replace("num_classes = 10", ""))
    torch.save(build(configs.load(free).model).state_dict(), tmp_path / "free.pt")
    unconditional = [tmp_path / "free.pt", "--preset", free, *runs[0][3:]]
    *refused, drawn = ranks.sample(
        tmp_path, *runs, [*unconditional, "--out", tmp_path / "free.npz"]
    )
    assert drawn == 0 and ranks.arrays(tmp_path / "free.npz")[1].tolist() == [0, 1, 2, 3] * 2 + [
        0,
        1,
    ]
    expected = [
        "model.num_classes = 4 instead of 10;",
        "model.num_classes = 12 instead of 10;",
        'diffusion.schedule = "linear" instead of "cosine";',
        "diffusion.steps = 500 instead of 1000;",
        'diffusion.steps = 500 instead of 1000, diffusion.schedule = "linear" instead of "cosine";',
    ]
    for status, name, message in zip(refused, others, expected, strict=True):
        assert f"trained with {message}" in str(status)
        assert f"{name}.safetensors (preset {tmp_path / name}.toml) cannot guide" in str(status)
        assert f"the network {weights['unet'][0]} (preset " in str(status)
        assert not (tmp_path / f"{name}.parts").exists()


def test_a_classifier_of_other_names_is_refused_where_the_shards_tell(tmp_path: Path) -> None:
    found = {}
    for name, folders in (("a", "xyz"), ("b", "xwz"), ("c", "xyz")):
        for folder in folders:
            path = tmp_path / name / folder / f"{folder}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image_file(0, width=8, height=8, kind="PNG"))
        pack(Request(str(tmp_path / name), PackConfig(size=8)), out=tmp_path / f"s{name}")
        changes = [f"data.shards = '{tmp_path / f's{name}'}'", "model.num_classes = 3"]
        found[name] = TrainedNetwork(configs.load("digits", changes), Path("w.pt"), "0", name, True)
    check_names(found["c"], network=found["a"], option="--classifier")
    with pytest.raises(
        ValueError, match=r"--classifier b: its class 0 is 'w'.*that of a 'x': train"
    ):
        check_names(found["b"], network=found["a"], option="--classifier")
    as_preset = replace(found["b"], has_own_config=False)
    check_names(as_preset, network=found["a"], option="--classifier")
    assert difference("x", "xy", named="a") == "its class 1 is 'y', that of a missing"
    # Images have the names of the network that knows classes, or those of what is enlarged.
    changes = [f"data.shards = '{tmp_path / 'sa'}'"]
    free = configs.load("digits", changes, unset=["model.num_classes"])
    up = configs.load("digits", [*changes, "model.small_size = 4"], unset=["model.num_classes"])
    guide = configs.load(
        "digits_classifier", [f"data.shards = '{tmp_path / 'sb'}'", "model.num_classes = 3"]
    )
    base, enlarger, classifier = (
        TrainedNetwork(config, Path("w.pt"), "0", "name", True) for config in (free, up, guide)
    )

    ask, cpu = ["w.pt", "--out", "d/", "--steps", "2"], torch.device("cpu")

    def job(*words: str, inputs: SampleInputs) -> DrawJob:
        arguments = sample.parser().parse_args([*ask, *words])
        return base_jobs(arguments, inputs, low_res_checksum=None, device=cpu)[0]

    guided = job("--classes", "z,w", inputs=SampleInputs(base, classifier, None))
    assert guided.labels is not None and guided.labels.classes == (2, 0)
    large = enlarging_job(guided, upsampler=enlarger, arguments=sample.parser().parse_args(ask))
    low_res = ["--low-res", str(tmp_path / "sb")]
    for each in (guided, large, job(*low_res, inputs=SampleInputs(enlarger, None, None))):
        assert each.classes == ("w", "x", "z")
    told = replace(up, model=replace(up.model, num_classes=3))
    conditional = SampleInputs(replace(enlarger, config=told), None, None)
    with pytest.raises(ValueError, match=r"--low-res: its class 0 is 'w'.*--classes-of .*sa"):
        job(*low_res, inputs=conditional)
    shutil.rmtree(tmp_path / "sb")
    check_names(found["b"], network=found["a"], option="--classifier")


def test_a_place_beside_a_network_says_which_one_is_meant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run and no checkpoint: give a directory with"):
        TrainedNetwork.find(tmp_path, preset=None, decay=None)
    (tmp_path / "run").mkdir()
    for link in ("run/checkpoints", "linked"):
        (tmp_path / link).symlink_to("/unmounted/it")
        with pytest.raises(ValueError, match=f"{link} is a link to /unmounted/it, which does not"):
            TrainedNetwork.find(tmp_path / link.removesuffix("/checkpoints"))
    (tmp_path / "state.json").touch()
    save_file({"w": torch.zeros(1)}, tmp_path / "ema-0.5.safetensors")
    with pytest.raises(ValueError, match=f"give its checkpoint {tmp_path}, or add --preset"):
        TrainedNetwork.find(tmp_path / "ema-0.5.safetensors", preset=None, decay=None)


@pytest.mark.parametrize("name", ["preset", "classifier-preset", "upsampler-preset"])
def test_a_weights_file_asks_for_the_preset_of_its_own_option(
    name: str, tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    nosuch, other = tmp_path / "nosuch", tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1)}, other)
    kept = shutil.copytree(tmp_path, tmp_path / "theirs" / "unet")
    (kept / other.name).rename(kept / "diffusion_pytorch_model.safetensors")
    option = name.removesuffix("preset").removesuffix("-")
    for given, said in (
        (nosuch, f"^no such run or weights file: {nosuch}$"),
        (weights["unet"][0], f"for a weights file, add --{name}$"),
        (other, f"does not say which network it is for: add --{name}$"),
        (kept.parent, f"has no config.toml, which trainer.export writes: add --{name}$"),
    ):
        words = [str(given)] if not option else [*weights["unet"], f"--{option}", str(given)]
        arguments = sample.parser().parse_args([*words, "--out", str(tmp_path / "a.npz")])
        with pytest.raises(ValueError, match=said):
            SampleInputs.find(arguments)


def test_a_run_that_is_not_there_is_no_run_without_averages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no such run: "):
        find(tmp_path / "nosuch", at=None)


def test_images_that_are_not_finite_are_refused(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    state = torch.load(weights["unet"][0], weights_only=True)
    asks, said = [], []
    for name, value, precision in (
        ("nan", torch.nan, "fp32"),
        ("big", 1e38, "fp32"),
        ("half", 1e5, "fp16"),
    ):
        state["out.2.bias"].fill_(value)
        torch.save(state, tmp_path / f"{name}.pt")
        ask = [tmp_path / f"{name}.pt", *weights["unet"][1:], "--images", "2", "--steps", "2"]
        asks.append([*ask, "--precision", precision, "--out", tmp_path / f"{name}.npz"])
    said = [str(status) for status in ranks.sample(tmp_path, *asks)]
    assert "nan.pt: out.2.bias has values that are not finite" in said[0]
    assert "images [0, 1]... are not finite" in said[1]
    assert "(bf16 or fp32) to another --out" in said[1]  # this one has its parts
    assert "half.pt: out.2.bias has values that are not finite in torch.float16: give" in said[2]
    assert not [*tmp_path.glob("*.npz")]


def test_an_upsampler_refuses_a_torn_low_res_file_and_labels_it_does_not_know(
    tmp_path: Path, tiny: Path
) -> None:
    preset = tmp_path / "upsampler.toml"
    preset.write_text(tiny.read_text().replace("[model]", "[model]\nsmall_size = 4"))
    torch.save(build(configs.load(preset).model).state_dict(), tmp_path / "upsampler.pt")
    small = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "unknown.npz", arr_0=small, arr_1=np.array([3, 10]))
    np.savez(tmp_path / "short.npz", arr_0=small, arr_1=np.array([3]))
    np.savez(tmp_path / "whole.npz", arr_0=small, arr_1=np.array([7, 3]))
    (tmp_path / "torn.npz").touch()
    ask = [tmp_path / "upsampler.pt", "--preset", preset, "--images", "2", "--steps", "2"]
    *refused, drawn = ranks.sample(
        tmp_path,
        *(
            [*ask, "--low-res", tmp_path / f"{name}.npz", "--out", tmp_path / f"{name}-8.npz"]
            for name in ("unknown", "short", "torn", "whole")
        ),
    )
    expected = ("10 is not among the classes 0 to 9", "short.npz: labels are", "torn.npz is not")
    for status, message in zip(refused, expected, strict=True):
        assert "--low-res" in str(status) and message in str(status)
    assert drawn == 0 and ranks.arrays(tmp_path / "whole-8.npz")[1].tolist() == [7, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "2"], "--scale = 2.0: must be absent without --classifier"),
        (["--classifier-preset", "x"], "--classifier-preset = 'x': must be absent without"),
        (["--eta", "-1"], "--eta = -1.0: must be from 0 to 1"),
        (["--eta", "2"], "--eta = 2.0: must be from 0 to 1"),
        (["--eta", "nan"], "--eta = nan: must be from 0 to 1"),
        (["--scale", "nan"], "--scale = nan: must be a finite number"),
        (["--out", "scale1.5"], "--out = 'scale1.5': must be a file that ends in .npz"),
        (["--seed", str(2**63)], f"--seed = {2**63}: must be a number of at most 63 bits"),
        (["--guide-at", "mean"], "--guide-at = 'mean': must be x_t without --classifier and for"),
        (["--upsampler-steps", "9"], "--upsampler-steps = '9': must be absent without --upsampler"),
        (["--cfg", "1,1"], "--cfg = (1.0, 1.0): must be different numbers"),
        (["--out", "/"], "--out = '/': must be a file that ends in .npz, or a directory"),
        (["--images", "0"], "--images = 0: must be at least 1"),
    ],
)
def test_an_option_that_would_be_ignored_or_means_nothing_is_refused(
    options: list[str], message: str
) -> None:
    words = [__file__, "--preset", "digits", "--out", "a.npz", *options]
    with pytest.raises(ValueError, match=re.escape(message)):
        sample.check_options(sample.parser().parse_args(words))


def test_a_place_that_cannot_be_written_is_refused_before_drawing(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "b.npz").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b.npz")  # which no directory can replace
    below, taken, linked, long = ranks.sample(
        tmp_path,
        *(
            [*weights["unet"], "--out", f"{tmp_path}/{out}"]
            for out in ("file/a.npz", "b.npz", "link/", f"{'n' * 246}.npz")
        ),
    )
    assert "cannot write" in str(below) and "name another --out" in str(below)
    assert "b.npz exists: name another --out" in str(taken)
    assert "link exists: name another --out" in str(linked)
    # The grid could not be written beside it once all is drawn.
    assert str(long) == f"--out: '{'n' * 32}'... has 250 bytes: must be at most 239"
