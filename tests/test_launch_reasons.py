"""Why Slurm does not start, take or show a job: what is said of it, and the way out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch import display, queue, records, status
from launch.__main__ import main
from tests.test_launch_status import make_run, make_writer, slurm, text
from trainer.run.lease import stop_file

OUTSIDE = "waiting does not start it: stop it with `python -m launch stop "
SPENT = "this budget does not cover it: wait until the site raises or resets it, or stop it with"
WAITS = "wait for it, or stop it with"
# Reasons as squeue of Slurm 22.05 shows them.
REASONS = {
    "PENDING (AssocGrpGRES)": WAITS,
    "PENDING (AssocGrpCPURunMinutesLimit)": WAITS,
    "PENDING (QOSMaxJobsPerUserLimit)": WAITS,
    "PENDING (PartitionTimeLimit)": OUTSIDE,
    "PENDING (PartitionTimeLimit in one of a,b)": WAITS,
    "PENDING (MaxMemPerLimit)": OUTSIDE,
    "PENDING (PartitionNodeLimit)": "wait for it, or, where its partition allows fewer nodes, stop",
    "PENDING (QOSMaxWallDurationPerJobLimit)": OUTSIDE,
    "PENDING (AssocMaxGRESPerJob)": OUTSIDE,
    "PENDING (InvalidQOS)": OUTSIDE,
    "PENDING (Job's account not permitted to use this partition (a allows b not c))": OUTSIDE,
    "PENDING (AssocGrpCPUMinutesLimit)": SPENT,
    "PENDING (QOSGrpBillingMinutes)": SPENT,
    "PENDING (AssocGrpWallLimit)": SPENT,
}
# Of a refused job sbatch first names the limit.
_POLICY = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose last job has the id 7."""
    run = make_run(tmp_path / "run", images=500)
    (run / "launch" / "job").write_text("7\n")
    return run


@pytest.mark.parametrize(("state", "way_on"), REASONS.items())
def test_a_job_that_does_not_start_by_waiting_is_not_to_be_waited_for(
    state: str, way_on: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "state", lambda _: state)
    with pytest.raises(records.Busy) as refusal:
        records.check_free(run)
    assert f"is {state}: {way_on}" in str(refusal.value)


def test_the_status_says_so_where_slurm_tried_the_job_s_only_partition(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_slurm", slurm({"7": "PENDING|PartitionTimeLimit|a"}, ended={}))
    assert f"job 7: PENDING (PartitionTimeLimit): {OUTSIDE}{run}`" in display.render(
        status.read(run), width=300
    )
    monkeypatch.setattr(queue, "_slurm", slurm({"7": "PENDING|PartitionTimeLimit|a,b"}, ended={}))
    assert status.read(run).job == "job 7: PENDING (PartitionTimeLimit in one of a,b)"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_job_that_slurm_hides_from_this_user_is_not_gone(
    state: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PrivateData=jobs of slurm.conf is that of squeue alone."""
    monkeypatch.setattr(queue, "_slurm", slurm({}, ended={"7": state}))
    assert status.read(run).job == f"job 7: {state} by sacct, not shown by squeue"
    assert not status.read(run).is_running
    make_writer(run)
    assert status.read(run).is_running and "images/s" in text(run)


@pytest.mark.parametrize(
    ("said", "way_on"),
    [
        ("Batch job submission failed: Invalid qos specification", "`sacctmgr show associations "),
        ("invalid partition specified: gpux", "`sinfo -s` lists the partitions"),
        ("Requested reservation is invalid", "`scontrol show reservation` lists them"),
        ("Batch job submission failed: Memory required by task is not available", "`sinfo -o '%P"),
        (f"QOSMaxGRESPerJob\nsbatch: error: {_POLICY}", "`sacctmgr show qos` and `scontrol show"),
        (f"AssocMaxSubmitJobLimit\nsbatch: error: {_POLICY}", "rerun this when others of your"),
    ],
)
def test_a_job_that_slurm_refuses_says_what_shows_the_right_values(
    said: str,
    way_on: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuses = f"echo 'sbatch: error: {said}' >&2; exit 1"
    for name, lines in {"squeue": "", "sbatch": refuses}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "site.toml").touch()
    words = ["digits", "--run", tmp_path / "new", "--cluster", tmp_path / "site.toml"]
    assert main(list(map(str, words))) == REFUSED
    shown = capsys.readouterr().err
    assert said.replace("\nsbatch: ", "\n") in shown and way_on in shown.splitlines()[-1]


def refuse(name: str, *, why: str) -> Callable[..., str]:
    """A stand-in for Slurm's commands, of which this one fails."""

    def run(*command: str, env: object = None) -> str:
        if command[0] == name:
            is_busy = any(words in why for words in queue.BUSY)
            raise (queue.NoAnswer if is_busy else ValueError)(f"{command[0]}: {why}")
        return "PENDING|Priority|a"

    return run


def test_a_job_that_another_user_may_not_remove_ends_when_it_starts(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "error: Kill job error on job id 7: Access/permission denied"
    monkeypatch.setattr(queue, "_slurm", refuse("scancel", why=why))
    assert main(["stop", str(run)]) == REFUSED
    said = capsys.readouterr().err
    assert why in said and "job 7 ends when it starts; its owner can remove it" in said
    assert stop_file(run).exists()


def test_a_run_is_stopped_while_slurm_does_not_respond(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = refuse("squeue", why="Unable to contact slurm controller")
    answers = [busy]
    gone = slurm({}, ended={})
    monkeypatch.setattr(
        queue, "_slurm", lambda *words: (answers.pop() if answers else gone)(*words)
    )
    assert main(["stop", str(run)]) == 0
    assert "Slurm does not respond now" in capsys.readouterr().out
    assert stop_file(run).exists()
