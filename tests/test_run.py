"""The run directory: its record of how a start ended, and what another machine sees of it late."""

import errno
import os
import re
import socket
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from data import files
from launch import status
from tests.support import ranks
from tests.support.faults import full_disk
from trainer.config import experiment as configs
from trainer.config.sections import IntervalConfig
from trainer.ranks.faults import Broken, Refused
from trainer.ranks.group import agreed
from trainer.ranks.process_group import connected
from trainer.ranks.world import join
from trainer.run import goodput
from trainer.run.directory import Run, fixed_among
from trainer.run.runstate import RunState, committed
from trainer.run.starts import starts_of
from trainer.saver import Saver

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can be another user")


@pytest.mark.parametrize(
    ("error", "state"),
    [(Refused("diverged"), "refused"), (Broken("no room"), "failed"), (KeyError("x"), "failed")],
)
def test_an_error_is_recorded_and_raised_also_where_it_cannot_be_recorded(
    tmp_path: Path, error: Exception, state: str
) -> None:
    with pytest.raises(type(error)), Run(tmp_path).claimed():
        raise error
    found = RunState.read(tmp_path)
    assert found is not None and (found.state, found.starts) == (state, 1)
    claim = Run(tmp_path).claimed()
    claim.__enter__()
    with full_disk():
        assert claim.__exit__(type(error), error, None) is False  # and raises nothing else
    found = RunState.read(tmp_path)
    assert found is not None and (found.state, found.starts) == ("running", 2)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        # By Inductor's kernels, Triton's and the libraries'.
        (RuntimeError("CUDA driver error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublas...`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas...`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
    ],
)
def test_an_error_of_the_main_ranks_device_counts_against_its_host(
    tmp_path: Path, error: Exception, counts: bool
) -> None:
    with pytest.raises(type(error)), Run(tmp_path).claimed():
        raise error
    found = RunState.read(tmp_path)
    assert found is not None and found.state == "failed" and str(error) in (found.why or "")
    assert found.lost == (socket.gethostname() if counts else None)


@pytest.mark.parametrize(("zone", "said"), [("UTC", "+0000"), ("Asia/Kolkata", "+0530")])
def test_a_line_of_the_log_says_its_time_zone(
    zone: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the login node, and of the node of the next start, may be another."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with Run(tmp_path).claimed() as run:
            run.log("begins")
    finally:
        monkeypatch.undo()
        time.tzset()
    line = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d{re.escape(said)}  begins\n", line)


def test_a_start_notes_how_far_its_clock_is_from_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts, on machines whose clocks differ."""
    skews, now = [30.0, 630.0, -86430.0], time.time
    for skew in skews:
        monkeypatch.setattr(time, "time", lambda skew=skew: now() + skew)
        with Run(tmp_path).claimed():
            pass
    starts = starts_of(goodput.read(tmp_path))
    assert [start.ahead for start in starts] == pytest.approx(skews, abs=5)
    assert starts[0].written is None and starts[1].written == pytest.approx(now(), abs=5)
    ahead, behind = (tmp_path / "log.txt").read_text().splitlines()
    assert re.search(r"the clock of \S+ is 10 min \d+ s ahead of that of the file system", ahead)
    assert " is 1 d 0 h behind that of the file system" in behind


def test_a_start_of_a_job_notes_when_that_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "launch" / "job.json"
    job.parent.mkdir()
    job.touch()
    os.utime(job, (1e9, 1e9))
    for number in ("", "7"):  # a file that an earlier job left is not of a start by hand
        monkeypatch.setenv("SLURM_JOB_ID", number)
        with Run(tmp_path).claimed():
            pass
    assert [start.submitted for start in starts_of(goodput.read(tmp_path))] == [None, 1e9]


def test_a_lost_rank_noted_by_several_threads_leaves_a_whole_state(tmp_path: Path) -> None:
    with Run(tmp_path).claimed() as run:
        run.note(checkpoint="000000000064", images_seen=64)

        def note() -> None:
            for _ in range(50):
                run.log_lost_rank("n1: lost: n2 (rank 1; computing)")

        threads = [threading.Thread(target=note) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = RunState.read(tmp_path)
    assert found is not None
    assert (found.state, found.checkpoint, found.starts) == ("failed", "000000000064", 1)
    assert found.lost == "n2"
    assert sorted(p.name for p in (tmp_path / "launch").iterdir()) == [
        "state.json",
        "timeline.jsonl",
    ]


@pytest.mark.parametrize(
    ("change", "is_fixed"),
    [
        ("model.blocks = 2", True),
        ('diffusion.predict = "x0"', True),
        ("training.seed = 1", True),
        ('training.timesteps = "loss-second-moment"', True),
        ("training.label_dropout = 0.1", True),
        ("training.ema = [0.9]", True),
        ("training.ema_images = 1", True),
        ("training.ema_warmup = 0.5", True),
        ("data.streams = 7", True),
        ("data.block = 7", True),
        ("model.checkpoint = true", False),
        ("training.lr = 1", False),
        ("data.workers = 0", False),
    ],
)
def test_what_makes_it_another_experiment_is_fixed(change: str, is_fixed: bool) -> None:
    changes = configs.changes(configs.load("digits"), configs.load("digits", [change]))
    assert [said.split(" = ")[0] for said in fixed_among(changes)] == [*changes] * is_fixed


def test_names_that_are_no_utf_8_are_logged_and_refused_for_a_run(tmp_path: Path) -> None:
    """safetensors could write no checkpoint there."""
    with Run(tmp_path).claimed() as run:
        run.log("of gr\udcf6n.pt")
    assert b"  of gr\xf6n.pt\n" in (tmp_path / "log.txt").read_bytes()
    with pytest.raises(ValueError, match=r"^--run = '.*gr\\udcf6n': must be UTF-8$"):
        Run(tmp_path / "gr\udcf6n").check(configs.load("digits"))


def test_to_look_again_for_a_directory_leaves_none_behind(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "file").touch()
    for place in (there, there / "not" / "here", tmp_path / "file" / "below"):
        files.look_again(place)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", there]


def test_a_listing_that_is_a_minute_old_hides_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for images_seen in (8, 16):
        (checkpoints / f"{images_seen:012d}").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    old = [checkpoints / f"{8:012d}"]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(old))
    monkeypatch.setattr(Path, "glob", lambda *_: iter(old))
    assert committed(checkpoints) == old
    RunState(state="finished", checkpoint=f"{16:012d}").write(tmp_path)
    assert [path.name for path in committed(checkpoints)] == [f"{16:012d}", f"{8:012d}"]
    assert (status.last_checkpoint(tmp_path, now=0) or "").startswith(f"{16:012d}")
    (checkpoints / f"{16:012d}").rename(checkpoints / "away")
    assert committed(checkpoints) == old


def commit_nothing(run: Path, fault: str) -> int:
    """A start on a disk that cannot rename directories, or where rank 1 is not the run's user."""
    world = join()
    with connected(world, patience=ranks.LIMIT), ExitStack() as stack:
        here = agreed(
            lambda: stack.enter_context(Run(run).claimed()) if world.is_main else Run(run)
        )
        saver = Saver(here, world=world, intervals=IntervalConfig(log=1, checkpoint=1))
        if world.is_main and fault == "renames":
            # As gcsfuse does.
            Path.rename = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))  # type: ignore[method-assign]
        if not world.is_main and fault == "user":
            os.seteuid(65534)
        saver.check_disk(SimpleNamespace(kinds=("model",), parameter_count=1))
    return 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("renames", "RUN: a directory cannot be renamed there (Too many open files), as checkpoin"),
        pytest.param("user", "rank 1: user nobody may not enter ", marks=AS_ROOT),
    ],
)
def test_a_disk_where_no_checkpoint_can_be_committed_ends_the_start(
    tmp_path: Path, fault: str, said: str
) -> None:
    tmp_path.chmod(0o700)
    job = ranks.fork(tmp_path, partial(commit_nothing, tmp_path / "run", fault), ranks=2)
    assert job.wait().startswith(f"error: {said.replace('RUN', str(tmp_path / 'run'))}"), job.text
    assert 0 not in [process.exitcode for process in job.ranks]
