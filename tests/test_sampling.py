"""Drawn images: the same on any number of ranks, in the evaluator's layout, never mixed or lost."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import golden, ranks
from trainer import config as configs
from trainer import sample, samplefile
from trainer.adm.unet import build
from trainer.draw import tile


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, list[str]]:
    """Networks with formula weights: a UNet as a published `.pt`, a classifier as safetensors."""
    root = tmp_path_factory.mktemp("weights")
    text = tiny.read_text().replace('objective = "denoise"', 'objective = "classify"')
    (root / "classifier.toml").write_text(text)
    nets = {}
    for name, preset in (("unet", tiny), ("classifier", root / "classifier.toml")):
        nets[name] = build(configs.load(preset).model)
        golden.set_formula_weights(nets[name])
    torch.save(nets["unet"].state_dict(), root / "unet.pt")
    save_file(nets["classifier"].state_dict(), root / "classifier.safetensors")
    return {
        "unet": [str(root / "unet.pt"), "--preset", str(tiny)],
        "guide": [
            "--classifier", str(root / "classifier.safetensors"),
            "--classifier-preset", str(root / "classifier.toml"), "--scale", "3",
        ],
    }  # fmt: skip


def draw(root: Path, *runs: list[str], world: int = 1) -> list[int | str]:
    job = ranks.start(
        root / f"job-{world}", ranks=world, runs=[["sample", *map(str, run)] for run in runs]
    )
    job.wait()
    return job.statuses


def interrupt(root: Path, run: list[str], *, drawn: Path) -> None:
    """Kill a run when it has drawn that part, where it waits."""
    task = partial(draw_until, root / "killed", ["sample", *map(str, run)], drawn)
    job = ranks.fork(root / "killed", task, ranks=1)
    ranks.wait_for(drawn)
    job.kill()


def draw_until(directory: Path, run: list[str], drawn: Path) -> int:
    def write_part(file: Path, *args: Any, **kwargs: Any) -> None:
        samplefile.write_part(file, *args, **kwargs)
        if file == drawn:
            signal.pause()

    sample.write_part = write_part
    return ranks.work(directory, [run], False)


def arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as samples:
        assert set(samples) == {"arr_0", "arr_1"}
        return samples["arr_0"], samples["arr_1"]


def test_images_do_not_depend_on_the_ranks(tmp_path: Path, weights: dict[str, list[str]]) -> None:
    ask = [*weights["unet"], "--images", "14", "--batch", "4", "--steps"]
    guided = [*ask, "5", *weights["guide"]]
    for world in (1, 2):
        runs = (
            [*guided, "--out", tmp_path / f"guided-{world}.npz"],
            [*ask, "ddim5", "--out", tmp_path / f"ddim-{world}.npz", "--classes", "7,2"],
            [*ask, "5", "--out", tmp_path / f"free-{world}.npz"],
        )
        assert draw(tmp_path, *runs, world=world) == [0, 0, 0]
    for name in ("guided", "ddim", "free"):
        images, labels = arrays(tmp_path / f"{name}-1.npz")
        assert images.shape == (14, 8, 8, 3) and images.dtype == np.uint8
        assert labels.tolist() == ([7, 2] * 7 if name == "ddim" else [*range(10), 0, 1, 2, 3])
        again, labels_again = arrays(tmp_path / f"{name}-2.npz")
        assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
        with Image.open(tmp_path / f"{name}-1.png") as grid:
            assert grid.size[0] >= 32
    free, guided_images = arrays(tmp_path / "free-1.npz")[0], arrays(tmp_path / "guided-1.npz")[0]
    assert not np.array_equal(free, guided_images)
    assert not list(tmp_path.glob("*.parts"))


def test_a_request_resumes_its_parts_and_refuses_others(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out = tmp_path / "samples.npz"
    ask = [*weights["unet"], "--images", "6", "--batch", "2", "--steps", "3", "--out", out]
    assert draw(tmp_path, ask) == [0]
    whole = arrays(out)[0]
    refused, other = draw(tmp_path, ask, [*ask[:-1], tmp_path / "b.npz", "--seed", "1"])
    assert "exists: name another --out" in str(refused) and other == 0
    assert not np.array_equal(whole, arrays(tmp_path / "b.npz")[0])

    # An interruption leaves the parts that were done. A drawn part is not drawn again.
    long = [*ask, "--images", "40", "--out", tmp_path / "long.npz"]
    first = tmp_path / "long.parts" / "000000.npz"
    interrupt(tmp_path, long, drawn=first)
    assert not (tmp_path / "long.npz").exists()
    (refused,) = draw(tmp_path, [*long, "--seed", "1"])
    assert "holds parts of another request" in str(refused)
    np.savez(first, images=np.full((2, 8, 8, 3), 77, np.uint8), labels=np.array([0, 1]))
    assert draw(tmp_path, long) == [0]
    resumed = arrays(tmp_path / "long.npz")[0]
    assert resumed.shape == (40, 8, 8, 3) and (resumed[:2] == 77).all()
    assert np.array_equal(resumed[2:6], whole[2:])


def test_parts_that_a_crash_damaged_are_drawn_again(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    ask = [*weights["unet"], "--images", "40", "--batch", "2", "--steps", "3", "--out"]
    parts = [tmp_path / "a.parts" / f"{part:06d}.npz" for part in range(6)]
    interrupt(tmp_path, [*ask, tmp_path / "a.npz"], drawn=parts[-1])
    two = np.full((2, 8, 8, 3), 77, np.uint8)
    os.truncate(parts[0], 0)
    content = bytearray(parts[1].read_bytes())
    content[len(content) // 3] ^= 1
    parts[1].write_bytes(content)
    np.savez(parts[2], images=two[:1], labels=np.array([4]))
    np.savez(parts[3], images=two, labels=np.array([7, 6]))
    np.savez(parts[4], images=two / 255, labels=np.array([8, 9]))
    np.savez(parts[5], images=two, labels=np.array([0, 1]))
    for left_behind in (parts[0], tmp_path / "a.npz"):
        left_behind.with_suffix(".partial").write_bytes(b"torn")
    (tmp_path / "a.png").write_bytes(b"torn")

    job = ranks.start(
        tmp_path / "again",
        ranks=2,
        runs=[["sample", *map(str, ask), str(tmp_path / f"{name}.npz")] for name in "ab"],
    )
    text = job.wait()
    assert job.statuses == [0, 0]
    said = [line for line in text.splitlines() if "is damaged and is drawn again: " in line]
    assert [line.split(" is ")[0] for line in said] == [str(part) for part in parts[:5]]
    resumed, labels = arrays(tmp_path / "a.npz")
    uninterrupted, _ = arrays(tmp_path / "b.npz")
    assert (resumed[10:12] == 77).all() and labels.tolist() == [*range(10)] * 4
    assert np.array_equal(np.delete(resumed, [10, 11], 0), np.delete(uninterrupted, [10, 11], 0))
    with Image.open(tmp_path / "a.png") as grid:
        grid.load()
    assert not list(tmp_path.glob("a.part*"))


def test_an_emptied_request_is_refused_by_name_or_written_again_where_there_are_no_parts(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    ask = [*weights["unet"], "--images", "2", "--steps", "2", "--out"]
    for name in ("drawn", "empty", "lost"):
        parts = tmp_path / f"{name}.parts"
        parts.mkdir()
        (parts / "000000.partial").write_bytes(b"torn")
        if name != "lost":
            (parts / "request.json").touch()
        if name != "empty":
            np.savez(parts / "000000.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    runs = ([*ask, tmp_path / f"{name}.npz"] for name in ("drawn", "empty", "lost"))
    drawn, empty, lost = draw(tmp_path, *runs)
    for status, name in ((drawn, "drawn"), (lost, "lost")):
        assert f"{name}.parts/request.json is missing or damaged" in str(status)
        assert f"remove {tmp_path / name}.parts" in str(status)
        assert (tmp_path / f"{name}.parts" / "000000.npz").exists()
    assert empty == 0 and arrays(tmp_path / "empty.npz")[0].shape == (2, 8, 8, 3)


def test_samples_that_appear_while_drawing_are_not_overwritten(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out, first = tmp_path / "a.npz", tmp_path / "a.parts" / "000000.npz"
    ask = [*weights["unet"], "--images", "40", "--batch", "2", "--steps", "3", "--out", str(out)]
    job = ranks.start(tmp_path / "job", ranks=1, runs=[["sample", *ask]])
    ranks.wait_for(first)
    out.write_bytes(b"another's")
    job.wait()
    assert f"{out} exists" in str(job.statuses[0])
    assert out.read_bytes() == b"another's" and first.exists()


def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out = ["--out", tmp_path / "never.npz", "--images", "2"]
    guide = weights["guide"]
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a tensor in sight")
    statuses = draw(
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
    )  # fmt: skip
    expected = [
        "10 is not among the classes 0 to 9",
        "2000",
        "is no upsampler: leave out --low-res",
        "name its preset too",
        "is a classifier; give it as --classifier",
        "does not fit the network of this preset",
        "weights file",
        "norun",
        "is no classifier",
    ]
    for status, message in zip(statuses, expected, strict=True):
        assert message in str(status) and len(str(status).splitlines()) == 1
    assert not (tmp_path / "never.npz").exists()


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
    *refused, drawn = draw(tmp_path, *runs, [*unconditional, "--out", tmp_path / "free.npz"])
    assert drawn == 0 and arrays(tmp_path / "free.npz")[1].tolist() == [0, 1, 2, 3] * 2 + [0, 1]
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


def test_a_classifier_run_of_another_schedule_is_refused_by_its_directory(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    ask = [*weights["unet"], "--images", "2", "--steps", "2", "--out", str(tmp_path / "a.npz")]
    linear = ["--set", 'diffusion.schedule = "linear"', "--set", "training.images = 8"]
    run = str(tmp_path / "c")
    train = ["train", weights["guide"][3], *linear, "--run", run]
    job = ranks.start(
        tmp_path / "job", ranks=1, runs=[train, ["sample", *ask, "--classifier", run]]
    )
    job.wait()
    trained, refused = job.statuses
    assert trained == 0
    assert f"--classifier {run} cannot guide the network {weights['unet'][0]}" in str(refused)
    assert 'trained with diffusion.schedule = "linear" instead of "cosine";' in str(refused)


def test_images_that_are_not_finite_are_refused(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    state = torch.load(weights["unet"][0], weights_only=True)
    state["out.2.bias"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    ask = [tmp_path / "nan.pt", *weights["unet"][1:], "--images", "2", "--steps", "2"]
    (status,) = draw(tmp_path, [*ask, "--out", tmp_path / "nan.npz"])
    assert "images [0, 1]... are not finite" in str(status)
    assert not (tmp_path / "nan.npz").exists()


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
    *refused, drawn = draw(
        tmp_path,
        *(
            [*ask, "--low-res", tmp_path / f"{name}.npz", "--out", tmp_path / f"{name}-8.npz"]
            for name in ("unknown", "short", "torn", "whole")
        ),
    )
    expected = ("10 is not among the classes 0 to 9", "short.npz: labels are", "torn.npz is not")
    for status, message in zip(refused, expected, strict=True):
        assert "--low-res" in str(status) and message in str(status)
    assert drawn == 0 and arrays(tmp_path / "whole-8.npz")[1].tolist() == [7, 3]


def test_a_grid_holds_every_image_once() -> None:
    images = np.arange(6 * 3 * 32 * 32, dtype=np.int64).reshape(6, 3, 32, 32).astype(np.uint8)
    grid = tile(images, columns=3)
    assert grid.shape == (3, 2 * 34, 3 * 34)
    for i in range(6):
        row, column = divmod(i, 3)
        top, left = row * 34 + 1, column * 34 + 1
        assert np.array_equal(grid[:, top : top + 32, left : left + 32], images[i])
