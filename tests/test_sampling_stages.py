"""Sampling at scale: sweeps, two stages and shards, killed at any moment, on 1 to 3 ranks."""

import json
import os
import random
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import dataset
from data.manifest import manifest_text
from tests.support import golden, ranks
from trainer import config as configs
from trainer.adm.unet import build
from trainer.parts import PartSampler
from trainer.samplefile import open_samples


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, list[str]]:
    """A base that was trained on dropped labels, and an upsampler from 8 to 16 px."""
    root = tmp_path_factory.mktemp("nets")
    large = tiny.read_text().replace("image_size = 8", "image_size = 16\nsmall_size = 8")
    texts = {
        "base": tiny.read_text().replace("seed = 3", "seed = 3\nlabel_dropout = 0.1"),
        "up": large.replace("attention = [4]", "attention = [8]"),
    }
    for name, text in texts.items():
        (root / f"{name}.toml").write_text(text)
        net = build(configs.load(root / f"{name}.toml").model)
        golden.set_formula_weights(net)
        torch.save(net.state_dict(), root / f"{name}.pt")
    up = [str(root / "up.pt"), "--upsampler-preset", str(root / "up.toml")]
    return {
        "base": [str(root / "base.pt"), "--preset", str(root / "base.toml")],
        "up": [str(root / "up.pt"), "--preset", str(root / "up.toml")],
        "and": ["--upsampler", *up, "--upsampler-steps", "ddim2"],
    }


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def draw_until_operation(directory: Path, run: list[str], last: int) -> int:
    """Draw as a rank that is killed as it begins its file operation number `last`."""
    begun = 0

    def counted(operation: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    for module, name in ((os, "fsync"), (os, "unlink"), (os, "rename"), (os, "replace")):
        setattr(module, name, counted(getattr(module, name)))
    return ranks.work(directory, [run], False)


@pytest.mark.parametrize(("out", "kills"), [("a.npz", 10), ("a/", 5)])
def test_killed_at_any_moment_two_stages_give_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, nets: dict[str, list[str]], out: str, kills: int
) -> None:
    ask = [*nets["base"], *nets["and"], "--images", "7", "--batch", "2", "--steps", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    assert ranks.sample(tmp_path, [*ask, "--out", f"{whole}/{out}"]) == [0]
    choose, statuses = random.Random(out), []
    for attempt in range(kills):
        world = 1 + attempt % 3
        task = partial(
            draw_until_operation,
            killed_job := tmp_path / f"job-{attempt}",
            ["sample", *ask, "--out", f"{killed}/{out}"],
            choose.randint(1, 24),
        )
        job = ranks.fork(killed_job, task, ranks=world)
        while all(process.is_alive() for process in job.ranks):
            job.ranks[0].join(0.05)
        job.kill()
        statuses.append(job.ranks[0].exitcode)
    assert statuses.count(-signal.SIGKILL) > kills // 2
    assert ranks.sample(tmp_path, [*ask, "--out", f"{killed}/{out}"], world=2) == [0]
    assert content(killed) == content(whole)
    assert {"a.png", "a-base.png"} <= content(whole).keys()


def hold_until_others_have_drawn(directory: Path, run: list[str], parts: Path) -> int:
    """Rank 1 of two draws its first part when all others are there."""
    draw = PartSampler.draw

    def late(sampler: PartSampler, part: int, **kwargs: Any) -> Any:
        while os.environ["RANK"] == "1" and len(list(parts.glob("00000*.npz"))) < 7:
            ranks.wait_for(parts)
        return draw(sampler, part, **kwargs)

    PartSampler.draw = late  # type: ignore[method-assign]
    return ranks.work(directory, [run], False)


def test_a_slow_rank_leaves_the_other_parts_to_the_fast_one(
    tmp_path: Path, nets: dict[str, list[str]]
) -> None:
    ask = [*nets["base"], "--images", "8", "--batch", "1", "--steps", "2"]
    run = ["sample", *ask, "--out", str(tmp_path / "a.npz")]
    task = partial(hold_until_others_have_drawn, tmp_path / "job", run, tmp_path / "a.parts")
    job = ranks.fork(tmp_path / "job", task, ranks=2)
    job.wait()
    assert job.statuses == [0]


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
    found = {path.stem: ranks.arrays(path)[0] for path in tmp_path.glob("*.npz")}
    swept = {f"s-scale{scale}-cfg{cfg}" for scale in (0, 3) for cfg in (1, 2)}
    assert found.keys() == {*swept, "plain", "mean", "adm"}
    assert np.array_equal(found.pop("s-scale0-cfg1"), found["plain"])
    assert len({images.tobytes() for images in found.values()}) == len(found)
    record = open_samples(tmp_path / "adm.npz").record
    assert record is not None and (record["pixels"], record["labels"]) == ("adm", "random")
    assert open_samples(tmp_path / "s-scale3-cfg2.npz").record["cfg"] == 2  # type: ignore[index]
    (refused,) = ranks.sample(
        tmp_path, [*weights["unet"], "--cfg", "2", "--out", tmp_path / "never.npz"]
    )
    assert "was trained without training.label_dropout" in str(refused)


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
        ask(unknown),
        ask(known, "--images", "4"),
        ask(known, "--classes", "1"),
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
        "--low-res images have no labels, and the network has classes",
        "--images = 4: must be at most the 3 of --low-res",
        "--classes: must be absent where the --low-res images have labels",
        "the images are 7 x 8; they must be 8 px, or 16 px to be reduced first",
    )
    for status, message in zip(statuses[4:], expected, strict=True):
        assert message in str(status)


def test_parts_that_the_last_release_left_are_continued_if_their_noise_is_the_same(
    tmp_path: Path, nets: dict[str, list[str]]
) -> None:
    """An upsampler's noise is keyed by the image size too since then."""
    whole, small = tmp_path / "whole.npz", tmp_path / "small.npz"
    ask = [*nets["base"], "--images", "6", "--batch", "2", "--steps", "2", "--out"]
    enlarge = [*nets["up"], "--low-res", small, "--batch", "2", "--steps", "2", "--out"]
    assert ranks.sample(tmp_path, [*ask, whole], [*ask, small]) == [0, 0]
    for name, run in (("a", ask), ("b", enlarge)):
        words = ["sample", *map(str, run), str(tmp_path / f"{name}.npz")]
        task = partial(draw_until_operation, tmp_path / name, words, 14)
        job = ranks.fork(tmp_path / name, task, ranks=1)
        job.ranks[0].join()
        request = tmp_path / f"{name}.parts" / "request.json"
        since = ("guide_at", "cfg", "labels", "pixels", "noise")
        left = {k: v for k, v in json.loads(request.read_text()).items() if k not in since}
        request.write_text(json.dumps(left))
    continued, refused = ranks.sample(
        tmp_path, [*ask, tmp_path / "a.npz"], [*enlarge, tmp_path / "b.npz"]
    )
    assert continued == 0 and (tmp_path / "a.npz").read_bytes() == whole.read_bytes()
    assert "noise was 1, is 2" in str(refused)


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
