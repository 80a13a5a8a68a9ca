"""Sampling at scale: killed at any moment, on a full disk, on 1 to 3 ranks."""

import errno
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data.exits import FAILED
from tests.support import ranks
from trainer import sample
from trainer.run.runstate import RunState
from trainer.sampling.parts import PartSampler


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


def draw_on_a_full_disk(directory: Path, run: list[str], since: int) -> int:
    """Draw as ranks of which the last one finds no room from its file operation `since` on."""
    fsync, begun = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal begun
        begun += os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        if begun >= since:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full
    return ranks.work(directory, [run], False)


@pytest.mark.parametrize(("world", "since"), [(2, 1), (1, 16)])
def test_on_a_full_disk_every_rank_ends_and_the_same_command_resumes(
    tmp_path: Path, nets: dict[str, list[str]], world: int, since: int
) -> None:
    ask = [*nets["base"], "--images", "8", "--batch", "2", "--steps", "2", "--out"]
    run = ["sample", *ask, str(tmp_path / "a.npz")]
    task = partial(draw_on_a_full_disk, tmp_path / "full", run, since)
    job = ranks.fork(tmp_path / "full", task, ranks=world)
    text = job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED] * world
    assert "No space left on device" in text and "; rerun the same command to resume" in text
    assert "Traceback" not in job.text
    whole = [*ask, tmp_path / "b.npz"]
    assert ranks.sample(tmp_path, [*ask, tmp_path / "a.npz"], whole) == [0, 0]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


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
            choose.randint(1, 20),
        )
        job = ranks.fork(killed_job, task, ranks=world)
        while all(process.is_alive() for process in job.ranks):
            job.ranks[0].join(0.05)
        job.kill()
        statuses.append(job.ranks[0].exitcode)
    assert statuses.count(-signal.SIGKILL) >= 3
    assert ranks.sample(tmp_path, [*ask, "--out", f"{killed}/{out}"], world=2) == [0]
    assert content(killed) == content(whole)
    assert {"a.png", "a-base.png"} <= content(whole).keys()


def end_at_the_first_part(words: list[str], number: signal.Signals) -> int:
    """Rank 1 of two is killed or stopped as it begins a part."""
    draw = PartSampler.draw

    def ended(sampler: PartSampler, part: int, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return draw(sampler, part, **kwargs)

    PartSampler.draw = ended  # type: ignore[method-assign]
    return sample.main(words)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_drawing_and_is_named(
    tmp_path: Path, nets: dict[str, list[str]], number: signal.Signals
) -> None:
    ask = [*nets["base"], "--images", "8", "--batch", "1", "--steps", "2", "--patience", "10"]
    words = [*ask, "--out", str(tmp_path / "a.npz"), "--job", str(tmp_path / "a.job")]
    task = partial(end_at_the_first_part, words, number)
    job = ranks.fork(tmp_path / "job", task, ranks=2)
    job.ranks[0].join(ranks.LIMIT)
    job.kill()
    assert job.ranks[0].exitcode == FAILED, job.text
    state = RunState.read(tmp_path / "a.job")
    assert state is not None and state.state == "failed", job.text
    assert re.search(r": lost: \S+ \(rank 1; [^)]*\): ", state.why or ""), state
    assert state.lost == socket.gethostname()  # the job script excludes it when it is lost again
    assert "Traceback" not in job.text


def hold_until_others_have_drawn(directory: Path, run: list[str], parts: Path) -> int:
    """Rank 1 of two draws its first part when all others are there."""
    draw = PartSampler.draw

    def late(sampler: PartSampler, part: int, **kwargs: Any) -> Any:
        while os.environ["RANK"] == "1" and len(list(parts.glob("00000*.npz"))) < 7:
            time.sleep(0.01)
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
