"""Drawn images: the same on any number of ranks, in the evaluator's layout, never mixed or lost."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data.exits import TO_BE_CONTINUED
from tests.support import ranks
from tests.support.pages import ROOT, Page
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.networks import TrainedNetwork
from trainer.sampling.draw import tile, to_pixels
from trainer.sampling.npz_output import NpzOutput


def interrupt(root: Path, run: list[str], *, drawn: Path) -> None:
    """Kill a run when it has drawn that part, where it waits."""
    task = partial(draw_until, root / "killed", ["sample", *map(str, run)], drawn)
    job = ranks.fork(root / "killed", task, ranks=1)
    ranks.wait_for(drawn)
    job.kill()


def draw_until(directory: Path, run: list[str], drawn: Path, then: Path | None = None) -> int:
    """Draw; wait once a part is drawn until a file is there, or for ever."""
    write = NpzOutput.write

    def write_and_wait(output: NpzOutput, part: int, *content: Any) -> None:
        write(output, part, *content)
        if drawn.exists():
            ranks.wait_for(then) if then is not None else signal.pause()

    NpzOutput.write = write_and_wait  # type: ignore[method-assign]
    return ranks.work(directory, [run], False)


def test_images_do_not_depend_on_the_ranks(tmp_path: Path, weights: dict[str, list[str]]) -> None:
    ask = [*weights["unet"], "--images", "14", "--batch", "4", "--steps"]
    guided = [*ask, "5", *weights["guide"]]
    for world in (1, 2):
        runs = (
            [*guided, "--out", tmp_path / f"guided-{world}.npz"],
            [*ask, "ddim5", "--out", tmp_path / f"ddim-{world}.npz", "--classes", "7,2"],
            [*ask, "5", "--out", tmp_path / f"free-{world}.npz"],
        )
        assert ranks.sample(tmp_path, *runs, world=world) == [0, 0, 0]
    for name in ("guided", "ddim", "free"):
        images, labels = ranks.arrays(tmp_path / f"{name}-1.npz")
        assert images.shape == (14, 8, 8, 3) and images.dtype == np.uint8
        assert labels.tolist() == ([7, 2] * 7 if name == "ddim" else [*range(10), 0, 1, 2, 3])
        again, labels_again = ranks.arrays(tmp_path / f"{name}-2.npz")
        assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
        with Image.open(tmp_path / f"{name}-1.png") as grid:
            assert grid.size[0] >= 32
    free, guided_images = (
        ranks.arrays(tmp_path / "free-1.npz")[0],
        ranks.arrays(tmp_path / "guided-1.npz")[0],
    )
    assert not np.array_equal(free, guided_images)
    assert not list(tmp_path.glob("*.parts"))


def test_a_request_resumes_its_parts_and_refuses_others(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out = tmp_path / "samples.npz"
    ask = [*weights["unet"], "--images", "6", "--batch", "2", "--steps", "3", "--out", out]
    assert ranks.sample(tmp_path, ask) == [0]
    whole = ranks.arrays(out)[0]
    again, refused, other = ranks.sample(
        tmp_path, ask, [*ask, "--seed", "1"], [*ask[:-1], tmp_path / "b.npz", "--seed", "1"]
    )
    assert again == other == 0
    assert "(seed was 0, is 1): name another --out" in str(refused)
    assert np.array_equal(whole, ranks.arrays(out)[0])
    assert not np.array_equal(whole, ranks.arrays(tmp_path / "b.npz")[0])

    # An interruption leaves the parts that were done. A drawn part is not drawn again.
    long = [*ask, "--images", "40", "--out", tmp_path / "long.npz"]
    first = tmp_path / "long.parts" / "000000.npz"
    interrupt(tmp_path, long, drawn=first)
    assert not (tmp_path / "long.npz").exists()
    (refused,) = ranks.sample(tmp_path, [*long, "--seed", "1"])
    assert "holds parts of another request" in str(refused)
    np.savez(first, images=np.full((2, 8, 8, 3), 77, np.uint8), labels=np.array([0, 1]))
    assert ranks.sample(tmp_path, long) == [0]
    resumed = ranks.arrays(tmp_path / "long.npz")[0]
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
    for left_behind in (parts[0], tmp_path / "a.npz", tmp_path / "a.png"):
        left_behind.with_name(f"{left_behind.name}.partial").write_bytes(b"torn")

    job = ranks.start(
        tmp_path / "again",
        ranks=2,
        runs=[["sample", *map(str, ask), str(tmp_path / f"{name}.npz")] for name in "ab"],
    )
    text = job.wait()
    assert job.statuses == [0, 0]
    said = [line for line in text.splitlines() if "is damaged and is drawn again: " in line]
    where = tmp_path / "a.parts"
    assert [line.split(" is ")[0] for line in said] == [f"part {i} of {where}" for i in range(5)]
    resumed, labels = ranks.arrays(tmp_path / "a.npz")
    uninterrupted, _ = ranks.arrays(tmp_path / "b.npz")
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
        (parts / "000000.npz.partial").write_bytes(b"torn")
        if name != "lost":
            (parts / "request.json").touch()
        if name != "empty":
            np.savez(parts / "000000.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    runs = ([*ask, tmp_path / f"{name}.npz"] for name in ("drawn", "empty", "lost"))
    drawn, empty, lost = ranks.sample(tmp_path, *runs)
    for status, name in ((drawn, "drawn"), (lost, "lost")):
        assert f"{name}.parts/request.json is missing or damaged" in str(status)
        assert f"remove {tmp_path / name}.parts" in str(status)
        assert (tmp_path / f"{name}.parts" / "000000.npz").exists()
    assert empty == 0 and ranks.arrays(tmp_path / "empty.npz")[0].shape == (2, 8, 8, 3)


def test_samples_that_appear_while_drawing_are_not_overwritten(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out, first = tmp_path / "a.npz", tmp_path / "a.parts" / "000000.npz"
    ask = [*weights["unet"], "--images", "4", "--batch", "2", "--steps", "3", "--out", str(out)]
    task = partial(draw_until, tmp_path / "job", ["sample", *ask], first, out)
    job = ranks.fork(tmp_path / "job", task, ranks=1)
    ranks.wait_for(first)
    out.write_bytes(b"another's")
    job.wait()
    assert f"{out} exists" in str(job.statuses[0])
    assert out.read_bytes() == b"another's" and first.exists()


def draw_late(directory: Path, run: list[str], done: Path, out: Path) -> int:
    """Draw, where another job ends the same output while the network is read."""
    net = TrainedNetwork.net

    def read(self: TrainedNetwork, **options: Any) -> torch.nn.Module:
        shutil.copy(done, out)
        return net(self, **options)

    TrainedNetwork.net = read  # type: ignore[method-assign]
    return ranks.work(directory, [run], False)


def test_what_another_job_has_drawn_since_the_start_is_not_drawn_again(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    done, out = tmp_path / "done.npz", tmp_path / "a.npz"
    ask = [*weights["unet"], "--images", "4", "--batch", "2", "--steps", "3", "--out"]
    assert ranks.sample(tmp_path, [*ask, done]) == [0]
    task = partial(draw_late, tmp_path / "late", ["sample", *ask, str(out)], done, out)
    job = ranks.fork(tmp_path / "late", task, ranks=1)
    job.wait()
    assert job.statuses == [0] and f"{out} is drawn already" in job.text
    assert not (tmp_path / "a.parts").exists()


def test_a_picture_of_something_else_is_not_overwritten(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    picture, out = tmp_path / "cat.png", tmp_path / "cat.npz"
    ask = [*weights["unet"], "--images", "2", "--steps", "2", "--out"]
    picture.write_bytes(b"a cat")
    assert f"{picture} exists" in str(ranks.sample(tmp_path, [*ask, out])[0])
    assert [path.name for path in tmp_path.glob("cat*")] == ["cat.png"]
    picture.unlink()
    (drawn,) = ranks.sample(tmp_path, [*ask, out])
    grid = picture.read_bytes()
    out.rename(tmp_path / "moved.npz")
    again, other, seed = ranks.sample(
        tmp_path, [*ask, out], [*ask, f"{tmp_path}/cat/", "--seed", "1"], [*ask, out, "--seed", "1"]
    )
    assert drawn == again == 0 and picture.read_bytes() == grid
    assert f"{picture} exists, where the grid of {tmp_path}/cat would go" in str(other)
    assert "seed was 0, is 1" in str(seed)


def test_python_as_the_manual_has_it_draws_the_commands_images_and_others_of_a_known_half(
    tmp_path: Path, tiny: Path
) -> None:
    file = tmp_path / "unet.safetensors"
    net = build(configs.load(tiny).model)
    save_file(net.state_dict(), file, metadata={"config": tiny.read_text()})
    ask = ["--images", "8", "--steps", "50", "--seed", "0", "--classes", "3"]
    assert ranks.sample(tmp_path, [file, *ask, "--out", tmp_path / "drawn.npz"]) == [0]
    code = Page(ROOT / "docs" / "sampling.md").python
    here = {"runs/imagenet64": str(file), "cuda": "cpu", "250": "50", "207": "3", ":32]": ":4]"}
    for text, own in here.items():
        assert code.count(text) == 1
        code = code.replace(text, own)
    found: dict[str, Any] = {}
    exec(code, found)
    images, others, mask = found["images"], found["others"], found["mask"]
    pixels = to_pixels(images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, ranks.arrays(tmp_path / "drawn.npz")[0])
    known, free = ((others - images)[mask == half].square().mean().sqrt() for half in (1, 0))
    assert known < 0.2 < 0.6 < free


def test_grey_levels_are_the_nearest_or_as_the_published_samples_the_ones_below() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5, torch.nan])
    assert to_pixels(values).tolist() == [0, 0, 128, 255, 255, 255, 0]
    assert to_pixels(values, truncate=True).tolist() == [0, 0, 127, 254, 255, 255, 0]


def test_a_grid_holds_every_image_once() -> None:
    images = np.arange(6 * 3 * 32 * 32, dtype=np.int64).reshape(6, 3, 32, 32).astype(np.uint8)
    grid = tile(images, columns=3)
    assert grid.shape == (3, 2 * 34, 3 * 34)
    for i in range(6):
        row, column = divmod(i, 3)
        top, left = row * 34 + 1, column * 34 + 1
        assert np.array_equal(grid[:, top : top + 32, left : left + 32], images[i])


def test_a_signal_stops_drawing_and_the_same_command_resumes(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    out = tmp_path / "a.npz"
    ask = [*weights["unet"], "--images", "40000", "--batch", "2", "--steps", "50", "--out", out]
    job = ranks.start(tmp_path / "stopped", ranks=2, runs=[["sample", *map(str, ask)]])
    ranks.wait_for(tmp_path / "a.parts" / "000000.npz")
    job.signal(1, signal.SIGTERM)
    job.signal(0, signal.SIGTERM)
    job.wait()
    assert job.statuses == [TO_BE_CONTINUED]
    assert "stopped by a signal; rerun the same command to resume" in job.text
    assert not out.exists()
    few = [*weights["unet"], "--images", "8", "--batch", "2", "--steps", "5"]
    (refused,) = ranks.sample(tmp_path, [*few, "--out", out])
    assert "(images was 40000, is 8; steps was '50', is '5')" in str(refused)


def test_a_second_job_on_one_file_is_refused_while_the_first_draws(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    ask = [*weights["unet"], "--images", "40", "--batch", "2", "--steps", "5"]
    drawn = tmp_path / "a.parts" / "000000.npz"
    run = [*ask, "--out", tmp_path / "a.npz"]
    task = partial(draw_until, tmp_path / "first", ["sample", *map(str, run)], drawn)
    first = ranks.fork(tmp_path / "first", task, ranks=1)
    ranks.wait_for(drawn)
    (refused,) = ranks.sample(tmp_path, run)
    first.kill()
    assert "is drawing" in str(refused) and "name another --out" in str(refused)
    assert ranks.sample(tmp_path, run) == [0]
