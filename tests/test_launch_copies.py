"""A copy of a run directory is a run of its own: it does not act on the original's job."""

import json
import shutil
from pathlib import Path

import pytest

from launch import queue, records, status
from launch.__main__ import main
from launch.cluster import Cluster
from launch.job import Job
from tests.test_launch_texts import ROOT


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run whose job 7 is pending, and a copy of it. No job but 7 is in the queue."""
    run = tmp_path / "a"
    job = Job(run=run, nodes=1, gpus_per_node=1, cluster=Cluster(), directory=tmp_path)
    records.prepare(job, preset=ROOT / "trainer" / "presets" / "digits.toml")
    records.keep_job_id(job, "7")
    shutil.copytree(run, tmp_path / "b")
    states = {"7": "PENDING (Resources)"}
    monkeypatch.setattr(queue, "state", states.get)
    monkeypatch.setattr(queue, "cancel", states.pop)
    return run, tmp_path / "b"


def test_stopping_a_copied_run_leaves_the_job_of_the_original(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, copy = copied
    assert main(["stop", str(copy)]) == 0
    assert queue.state("7") is not None
    assert "stopped; last checkpoint: none" in capsys.readouterr().out
    assert main(["stop", str(original)]) == 0
    assert queue.state("7") is None


def test_a_copied_run_starts_while_the_job_of_the_original_is_queued(
    copied: tuple[Path, Path],
) -> None:
    original, copy = copied
    records.check_free(copy)
    with pytest.raises(ValueError, match=r"job 7 of .* is PENDING"):
        records.check_free(original)
    assert status.read(copy).job == "no job"


def test_a_run_is_found_by_another_name_of_its_directory(copied: tuple[Path, Path]) -> None:
    original, _ = copied
    link = original.with_name("link")
    link.symlink_to(original)
    assert records.job_id(link) == "7"


def test_a_run_of_the_last_release_keeps_its_job(copied: tuple[Path, Path]) -> None:
    original, _ = copied
    file = original / "launch" / "job.json"
    facts = json.loads(file.read_text())
    facts.pop("run", None)
    file.write_text(json.dumps(facts))
    assert records.job_id(original) == "7"
    file.unlink()
    assert records.job_id(original) == "7"
