"""Run directories: what is none is not touched, and a copy is a run of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data.exits import FAILED
from launch import queue, records, status
from launch.__main__ import main
from launch.cluster import Cluster
from launch.job import Job
from tests.test_launch_errors import DRY_RUNS, SLURM, refused
from tests.test_launch_texts import ROOT
from trainer.options import parser
from trainer.run import origin


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run whose job 7 is pending, and a copy of it. No job but 7 is in the queue."""
    run = tmp_path / "a"
    preset = ROOT / "trainer" / "presets" / "digits.toml"
    size = {"nodes": 1, "gpus_per_node": 1}
    job = Job(run=run, **size, cluster=Cluster(), directory=tmp_path, preset=preset)
    records.prepare(job)
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


@pytest.mark.parametrize(
    ("state", "way_on"),
    [
        ("PENDING (Priority)", "wait for it, or stop it with "),
        # After a prolog that failed.
        ("PENDING (launch failed requeued held)", "release it with `scontrol release 7`, or stop"),
        ("REQUEUE_HOLD", "release it with `scontrol release 7`, or stop it with "),
        ("PENDING (JobHeldUser)", "release it with `scontrol release 7`, or stop it with "),
    ],
)
def test_a_held_job_is_not_to_be_waited_for(
    state: str, way_on: str, copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "state", lambda _: state)
    with pytest.raises(records.Busy) as refusal:
        records.check_free(copied[0])
    assert f"is {state}: {way_on}" in str(refusal.value)


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
    (original / "code" / "COMMIT").unlink()
    records.check_directory(original)


@DRY_RUNS
@pytest.mark.parametrize("verb", ["", "sweep", "sample"])
@pytest.mark.parametrize(
    "own",
    [
        "code/a.py",
        "code/trainer/a.py code/.git/HEAD launch/job.json launch/lock",
        "config.toml code/a.py",
        "launch/job.sh",
        "config.toml launch/preset.toml",
        "notes.txt",
    ],
)
def test_a_directory_that_is_no_run_is_left_as_it_is(
    verb: str,
    own: str,
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / ("digits" if verb != "sample" else "digits.job")
    for name in own.split():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    where = {"": "--run", "sweep": "--runs", "sample": "--out"}[verb]
    target = tmp_path / {"": "digits", "sweep": "", "sample": "digits.npz"}[verb]
    what = ROOT if verb == "sample" else "digits"
    refused(*filter(None, [verb]), what, where, target, "--cluster", SLURM, *options)
    said = capsys.readouterr()
    assert str(directory) in said.err and "name a new directory" in said.err
    assert said.out == "" and said.err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_stop_writes_nothing_where_no_job_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    refused("stop", tmp_path)
    assert "is not a run directory" in capsys.readouterr().err
    assert not any((tmp_path / "launch").iterdir())


def test_the_directory_of_an_array_takes_a_job_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "0" / "launch").mkdir(parents=True)
    (tmp_path / "sweep.sh").touch()
    records.check_directory(tmp_path)


def test_a_full_disk_is_named_in_one_line_and_leaves_no_half_copy(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch", "digits", "--run", str(tmp_path / "run")]
    full = ["bash", "-c", 'ulimit -f 8; exec "$@"', "", *words]  # the error of a quota
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == FAILED
    assert re.fullmatch(r"error: \[Errno 27\] File too large: '[^'\n]+'.*\n", done.stderr)
    assert len(done.stderr) < 400 and not list((tmp_path / "run").glob("*code*"))


def trained(words: Sequence[str]) -> Namespace:
    """The command line of the ranks that `--dry-run` prints for these words."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "digits", *words, "--dry-run"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    script = shlex.split(done.stdout.replace("\\\n", " "), comments=True)
    return parser().parse_args(script[script.index("trainer.train") + 1 :])


def test_a_job_begins_from_weights_or_an_earlier_checkpoint_and_says_it_again_when_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights, run, mine = Path("w.pt"), tmp_path / "run", Path("ds.json")
    weights.touch()
    mine.write_bytes((ROOT / "ds_config.json").read_bytes())
    words = ["--run", "run", "--init", "w.pt", "--init-skip", "label_emb", "out"]
    first = trained([*words, "--ds-config", "ds.json"])
    assert (first.init, first.init_skip) == (tmp_path / "w.pt", ["label_emb", "out"])
    assert first.ds_config == str(run / "launch" / "ds_config.json")
    (run / "checkpoints" / "000000000128").mkdir(parents=True)
    (run / "config.toml").touch()
    weights.unlink()
    assert vars(trained(words)) == vars(first) | {"ds_config": f"{run}/code/ds_config.json"}
    for wanted in ("128", "run/checkpoints/000000000128"):
        assert vars(trained(["--run", "run", "--from", wanted]))["from"] == "000000000128"
    (run / "launch").mkdir()
    origin.record(run / "checkpoints" / "000000000128", run=run)
    (run / "checkpoints" / "000000000128").rename(run / "checkpoints" / "000000000256")
    (run / "launch" / "lock").touch()
    assert vars(trained(["--run", "run", "--from", "128"]))["from"] == "128"
    assert "was done before: the run resumes" in capfd.readouterr().err


def test_a_job_reads_its_own_copy_of_ds_config_and_nothing_of_an_earlier_job(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "ds.json"
    mine.write_text("{}")
    size = {"nodes": 1, "gpus_per_node": 1}
    job = Job(run=tmp_path / "a", **size, cluster=Cluster(), directory=tmp_path, ds_config=mine)
    records.prepare(job)
    mine.unlink()
    earlier = [
        job.records / name for name in ("stop", "failed-at", "limited-at", "lost-hosts", "job")
    ]
    for file in earlier:
        file.write_text("n2\n")
    again = replace(job, ds_config=job.ds_config_copy)
    records.prepare(again)
    assert not any(file.exists() for file in earlier)
    assert again.ds_config_copy.read_text() == "{}"
