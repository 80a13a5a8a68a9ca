"""Sampling as a job: its shares, its state, and how it is stopped."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data import progress
from data.exits import TO_BE_CONTINUED
from launch import status
from launch.__main__ import main as launch
from tests.support import ranks
from tests.support.cluster import ROOT
from trainer import sample
from trainer.ranks.signals import Preemption
from trainer.run.lease import claim, live_holder
from trainer.run.runstate import RunState
from trainer.sampling import drawing
from trainer.sampling.inputs import SampleInputs
from trainer.sampling.jobstate import JobState, noted
from trainer.sampling.parts import DrawJob
from trainer.sampling.requests import base_jobs

FEW = ["--images", "10", "--batch", "2", "--steps", "4"]


def test_the_shares_of_an_array_are_one_output(tmp_path: Path, weights: dict) -> None:
    def words(name: str, *share: str) -> list[object]:
        return [*weights["unet"], *FEW, "--out", tmp_path / name, *share]

    shares = [words("shared.npz", "--share", f"{n}/3") for n in (2, 0)]
    assert ranks.sample(tmp_path, *shares, world=2) == [0, 0]
    assert not (tmp_path / "shared.npz").exists()
    last = [words("shared.npz", "--share", "1/3"), words("whole.npz")]
    assert ranks.sample(tmp_path, *last) == [0, 0]
    shared, whole = (ranks.arrays(tmp_path / f"{name}.npz") for name in ("shared", "whole"))
    assert all(np.array_equal(a, b) for a, b in zip(shared, whole, strict=True))
    assert ranks.sample(tmp_path, words("shared.npz", "--share", "0/3")) == [0]  # drawn already


def test_the_whole_is_not_drawn_beside_one_of_its_shares(tmp_path: Path, weights: dict) -> None:
    words = [*weights["unet"], *FEW, "--out", tmp_path / "x.npz"]
    assert ranks.sample(tmp_path, [*words, "--share", "0/3"]) == [0]
    share = claim(tmp_path / "x.parts" / "share-0-of-3")
    (said,) = ranks.sample(tmp_path, words)
    assert "is drawing" in str(said) and "share-0-of-3" in str(said)
    share.release()
    assert ranks.sample(tmp_path, words) == [0]


def draw_saying_all(directory: Path, words: list[str]) -> int:
    """Draw as a rank that prints its progress at every step, not once a minute."""
    progress._EVERY = -1.0
    return ranks.work(directory, [["sample", *words]], False)


def test_a_start_says_how_many_batches_it_has_checked(tmp_path: Path, weights: dict) -> None:
    words = [*weights["unet"], *FEW, "--out", str(tmp_path / "x.npz")]
    assert ranks.sample(tmp_path, [*words, "--share", "0/2"]) == [0]
    job = ranks.fork(tmp_path / "job", partial(draw_saying_all, tmp_path / "job", words), ranks=1)
    said = job.wait()
    assert job.statuses == [0]
    assert [f"{n} of 3 batches checked," in said for n in range(5)] == [False, *[True] * 3, False]
    assert "5 of 5 batches joined," in said


def test_a_failure_is_noted_beside_a_batch_that_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    state, fsync = JobState(tmp_path), os.fsync
    drawn = threading.Thread(target=state.advance)

    def meanwhile(descriptor: int) -> None:
        monkeypatch.undo()
        drawn.start()
        drawn.join(0.5)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    why = "n1: lost: n2 (ranks 2, 3; working): not heard from for 60 s"
    state.fail(why)
    drawn.join()
    found = RunState.read(tmp_path)
    assert found is not None and (found.state, found.why, found.lost) == ("failed", why, "n2")


@pytest.mark.parametrize("error", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_gpu_that_fails_counts_against_its_node(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(error), noted(tmp_path, preemption=Preemption()):
        raise error("CUDA error: unspecified launch failure")
    found = RunState.read(tmp_path)
    assert found is not None and found.state == "failed"
    assert found.lost == (socket.gethostname() if error is torch.AcceleratorError else None)


def job_of(words: list[str]) -> DrawJob:
    """The only job of a command line."""
    arguments = sample.parser().parse_args([*words])
    inputs, cpu = SampleInputs.find(arguments), torch.device("cpu")
    (job,) = base_jobs(arguments, inputs, low_res_checksum=None, device=cpu)
    return job


def begin(words: list[str]) -> None:
    job_of(words).output.open()


def test_shares_may_begin_and_end_at_the_same_time(
    tmp_path: Path, weights: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*weights["unet"], *FEW, "--out", str(tmp_path / "x.npz"), "--share", "0/2"]
    job, other = job_of(words), ranks.forks().Process(target=begin, args=(words,))
    fsync = os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.undo()
        other.start()
        other.join()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    job.output.open()
    assert other.exitcode == 0 and job.output.is_begun()
    labels = job.all_labels()
    assert labels is not None
    for part, own in enumerate(np.split(labels, job.output.parts)):
        job.output.write(part, np.zeros((len(own), 8, 8, 3), np.uint8), own)
    joining = claim(job.output.work)
    assert "another share" in drawing._publish_shares(job)
    joining.release()
    assert drawing._publish_shares(job) == "" and job.output.is_drawn()
    assert "another share" in drawing._publish_shares(job)


def start(directory: Path, *words: object) -> "subprocess.Popen[str]":
    """`python -m launch sample` on this machine, in `directory`."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "sample", *map(str, words)],
        cwd=directory,
        env={**ranks.environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def begun_drawing(directory: Path, weights: dict) -> "subprocess.Popen[str]":
    """A job `x.job` that has drawn a batch."""
    words = [*weights["unet"], "--batch", 2, "--images", 50_000, "--out", "x.npz"]
    drawing = start(directory, *words, "--steps", 10)
    end = time.monotonic() + ranks.LIMIT
    while (state := RunState.read(directory / "x.job")) is None or state.checkpoint is None:
        assert time.monotonic() < end and drawing.poll() is None, drawing.communicate()[0]
        time.sleep(0.1)
    return drawing


def test_a_signal_is_answered_by_what_drawing_does(tmp_path: Path, weights: dict) -> None:
    """It was by what training does, which saves a run."""
    drawing = begun_drawing(tmp_path, weights)
    drawing.send_signal(signal.SIGTERM)
    said = drawing.communicate(timeout=ranks.LIMIT)[0]
    assert drawing.returncode == TO_BE_CONTINUED, said
    stops = "stop requested: the drawing stops after this step; finished batches are kept\n"
    assert said.count("stop requested") == said.count(stops) == 1
    assert "stopped by a signal; rerun the same command to resume\n" in said
    assert status.read(tmp_path / "x.job").health == "stopped by a signal"


def test_a_job_that_draws_stops_on_request(
    tmp_path: Path, weights: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    job, drawing = tmp_path / "x.job", begun_drawing(tmp_path, weights)
    shown = status.read(job)
    assert shown.is_running and shown.health.startswith("drawing: ")
    # It waits until nothing is drawn any more.
    assert launch(["stop", str(job)]) == 0
    assert "stopped; to resume, run" in capsys.readouterr().out  # it has no checkpoints
    assert live_holder(job) is None
    said = drawing.communicate(timeout=ranks.LIMIT)[0]
    assert drawing.returncode == TO_BE_CONTINUED, said
    state = RunState.read(job)
    assert state is not None and state.state == "stopped"
    assert state.why == "by `python -m launch stop`" and f"stopped {state.why}; to resume, " in said
    assert "signal" not in said
    assert state.checkpoint == f"{len(list(tmp_path.glob('x.parts/*.npz'))):012d}"
    assert not (tmp_path / "x.npz").exists()
