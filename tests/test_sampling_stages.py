"""Sweeps over scales, two stages, shards, and what is enlarged."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import dataset
from data.manifest import manifest_text
from tests.support import ranks
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.sampling.draw import SamplerConfig, draw
from trainer.sampling.samplefile import open_samples


def test_a_sweep_has_an_output_for_each_scale_and_factor(
    tmp_path: Path, nets: dict[str, list[str]], weights: dict[str, list[str]]
) -> None:
    ask = [*nets["base"], "--images", "4", "--batch", "4", "--steps", "3"]
    guide = weights["guide"][:-2]
    statuses = ranks.sample(
        tmp_path,
        [*ask, *guide, "--scale", "0,3", "--cfg", "1,2", "--out", tmp_path / "s.npz"],
        [*ask, "--out", tmp_path / "plain.npz"],
        [*ask, *guide, "--scale", "3", "--guide-at", "mean", "--out", tmp_path / "mean.npz"],
        [*ask, "--pixels", "adm", "--labels", "random", "--out", tmp_path / "adm.npz"],
        [*ask, *guide, "--scale", "0,3", "--cfg", "1,2", "--out", tmp_path / "s.npz"],
    )
    assert statuses == [0] * 5
    said = ranks.output(tmp_path / "job-1", 0).read_text()
    outputs = [f"s-scale{scale}-cfg{cfg}.npz" for scale in (0, 3) for cfg in (1, 2)]
    assert [line for line in said.splitlines() if line.startswith("drawing ")] == [
        f"drawing {tmp_path / name}, {n} of 4 outputs" for n, name in enumerate(outputs, start=1)
    ]
    found = {path.stem: ranks.arrays(path)[0] for path in tmp_path.glob("*.npz")}
    swept = {f"s-scale{scale}-cfg{cfg}" for scale in (0, 3) for cfg in (1, 2)}
    assert found.keys() == {*swept, "plain", "mean", "adm"}
    assert np.array_equal(found.pop("s-scale0-cfg1"), found["plain"])
    assert len({images.tobytes() for images in found.values()}) == len(found)
    record = open_samples(tmp_path / "adm.npz").record
    assert record is not None and (record["pixels"], record["labels"]) == ("adm", "random")
    assert open_samples(tmp_path / "s-scale3-cfg2.npz").record["cfg"] == 2  # type: ignore[index]
    half = tmp_path / "t-scale3.parts"
    half.mkdir()
    (half / "request.json").write_text(json.dumps({**record, "images": 99}))
    refused, undropped = ranks.sample(
        tmp_path,
        [*ask, *guide, "--scale", "0,3", "--out", tmp_path / "t.npz"],
        [*weights["unet"], "--cfg", "2", "--out", tmp_path / "never.npz"],
    )
    assert "t-scale3.parts holds parts of another request" in str(refused)
    assert "images was 99, is 4" in str(refused)
    assert not (tmp_path / "t-scale0.parts").exists()
    assert "was trained without training.label_dropout" in str(undropped)


def test_a_sampler_in_python_takes_nothing_that_it_would_leave_unused(tiny: Path) -> None:
    config = configs.load(tiny, ["training.label_dropout = 0.1"])
    sampler = SamplerConfig.of(config, steps="2", seed=0, cfg=3.0)
    with pytest.raises(ValueError, match="guide_at = 'mean': must be \"x_t\" with eta"):
        replace(sampler, eta=0.0, guide_at="mean")
    with pytest.raises(ValueError, match=r"cfg = 3\.0: must be absent for a network trained with"):
        SamplerConfig.of(configs.load(tiny), steps="2", seed=0, cfg=3.0)
    config = configs.load(tiny, unset=["model.num_classes"])
    net, of = build(config.model), torch.arange(2)
    with pytest.raises(ValueError, match=r"cfg = 3\.0: guides to labels"):
        draw(net, of, config=config.unet, sampler=sampler)
    draw(net, of, config=config.unet, sampler=replace(sampler, cfg=1.0))


def test_drawn_shards_are_enlarged_and_trained_on(
    tmp_path: Path, nets: dict[str, list[str]], tiny: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large.npz"
    ask = ["--batch", "4", "--steps", "2", "--out"]
    drawn, enlarged = ranks.sample(
        tmp_path,
        [*nets["base"], "--images", "18", *ask, f"{small}/", "--classes", "3,1"],
        [*nets["up"], *ask, large, "--low-res", small],
    )
    assert drawn == enlarged == 0
    assert dataset.verify(small, full=True) == []
    images, labels = ranks.arrays(large)
    assert images.shape == (18, 16, 16, 3) and labels.tolist() == [3, 1] * 9
    record = open_samples(large).record
    assert record is not None and record["low_res"] == open_samples(small).checksum()
    with Image.open(tmp_path / "large.png") as grid:  # two columns of pairs, enlarged twice
        assert grid.size == (2 * (2 * 32 + 2), 9 * (32 + 2))
        cell = np.asarray(grid.convert("RGB"))[1:33, 1:33]
    first = open_samples(small).images(0, 1)[0]
    assert np.array_equal(cell, first.repeat(4, axis=0).repeat(4, axis=1))
    sets = [f'data.shards = "{small}"', "training.images = 8", "data.streams = 2"]
    options = [word for each in sets for word in ("--set", each)]
    train = ["train", str(tiny), *options, "--run", str(tmp_path / "run")]
    job = ranks.start(tmp_path / "train", ranks=1, runs=[train])
    job.wait()
    assert job.statuses == [0]


def test_count_and_labels_of_an_enlargement_are_those_of_the_low_resolution(
    tmp_path: Path, nets: dict[str, list[str]], digits: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "known.npz", arr_0=pixels, arr_1=np.array([4, 0, 9]))
    np.savez(tmp_path / "unknown.npz", arr_0=pixels)
    np.savez(tmp_path / "large.npz", arr_0=pixels.repeat(2, 1).repeat(2, 2), arr_1=[4, 0, 9])
    np.savez(tmp_path / "odd.npz", arr_0=pixels[:, 1:], arr_1=[4, 0, 9])
    (tmp_path / "labels.txt").write_text("4\n0\n9\n")

    def ask(source: Path, *more: object) -> list:
        out = tmp_path / f"{len(more)}-{source.stem}-large.npz"
        return [*nets["up"], "--low-res", source, "--steps", "2", "--out", out, *more]

    known, unknown = tmp_path / "known.npz", tmp_path / "unknown.npz"
    statuses = ranks.sample(
        tmp_path,
        ask(known),
        ask(unknown, "--labels", tmp_path / "labels.txt"),
        ask(tmp_path / "large.npz"),
        ask(digits, "--images", "3"),
        ask(known, "--images", "4"),
        ask(tmp_path / "odd.npz"),
    )
    assert statuses[:4] == [0] * 4
    images, labels = ranks.arrays(tmp_path / "0-known-large.npz")
    assert labels.tolist() == [4, 0, 9]
    for same in ("2-unknown-large.npz", "0-large-large.npz"):
        assert np.array_equal(ranks.arrays(tmp_path / same)[0], images), same
    real = open_samples(digits).labels
    assert real is not None
    assert ranks.arrays(tmp_path / "2-digits-large.npz")[1].tolist() == real[:3].tolist()
    expected = (
        "--images = 4: must be at most the 3 of --low-res",
        "the images are 7 x 8; they must be 8 px, or 16 px to be reduced first",
    )
    for status, message in zip(statuses[4:], expected, strict=True):
        assert message in str(status)


def test_classes_have_the_names_of_the_training_shards(
    tmp_path: Path, nets: dict[str, list[str]]
) -> None:
    names = ["cat", "dog", *map(str, range(2, 10))]
    (tmp_path / "shards").mkdir()
    text = manifest_text((), classes=tuple(names), image_size=8, made_by={})
    (tmp_path / "shards" / "manifest.json").write_text(text)
    like = Path(nets["base"][2]).read_text()
    for name in ("shards", "gone"):
        shards = re.sub('shards = ".*"', f'shards = "{tmp_path / name}"', like)
        (tmp_path / f"{name}.toml").write_text(shards)
    ask = ["--images", "4", "--steps", "2", "--classes", "dog,3,cat", "--out"]
    net = nets["base"][0]
    drawn, refused = ranks.sample(
        tmp_path,
        [net, "--preset", tmp_path / "shards.toml", *ask, f"{tmp_path}/a/"],
        [net, "--preset", tmp_path / "gone.toml", *ask, f"{tmp_path}/b/"],
    )
    assert drawn == 0
    samples = open_samples(tmp_path / "a")
    assert samples.labels is not None and samples.labels.tolist() == [1, 3, 0, 1]
    assert dataset.open_shards(tmp_path / "a").classes == tuple(names)
    assert "names of classes are in the manifest of data.shards, and no dataset at" in str(refused)
