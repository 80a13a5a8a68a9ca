"""A run without a scheduler: the status and the signals that the user's shell sees."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch import records, status
from tests.support.batch import STRICT
from tests.support.cluster import LIMIT, ROOT, wait_until
from trainer.run import lease

SAVES_ON_A_SIGNAL = """\
trap 'sleep 0.3; touch saved; exit 75' INT HUP TERM
touch started
for try in {1..600}; do sleep 0.1; done"""


def start(directory: Path, *options: str, ranks: str, **variables: str) -> "subprocess.Popen[str]":
    """Start a run whose interpreter does as `ranks` says, in bash, in `directory`."""
    python, settings = directory / "python", directory / "site.toml"
    python.write_text(f"#!/bin/bash\n{ranks}\n")
    python.chmod(0o755)
    settings.write_text(f'launcher = "alone"\npython = "{python}"\n')
    words = ["digits", "--run", directory / "run", "--cluster", settings, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("status", [0, 1, 75, 78])
def test_the_exit_status_is_that_of_the_run(status: int, tmp_path: Path) -> None:
    assert start(tmp_path, ranks=f"exit {status}").wait(timeout=LIMIT) == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_ctrl_c_and_a_closed_terminal_let_the_ranks_save(
    number: signal.Signals, tmp_path: Path
) -> None:
    job = start(tmp_path, ranks=SAVES_ON_A_SIGNAL)
    wait_until((tmp_path / "started").exists, "the ranks")
    os.killpg(job.pid, number)  # as a terminal does
    assert job.wait(timeout=LIMIT) == 75
    assert (tmp_path / "saved").exists()


def test_two_launches_of_a_run_at_once_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    with records.claimed(tmp_path / "run"):  # as the first does while it copies the code
        assert start(tmp_path, ranks="exit 0").wait(timeout=LIMIT) == REFUSED
    assert not list((tmp_path / "run").glob("*code*"))
    job = start(tmp_path, ranks=SAVES_ON_A_SIGNAL)
    wait_until((tmp_path / "started").exists, "the ranks")
    again = start(tmp_path, "--detach", ranks=SAVES_ON_A_SIGNAL)  # before they claim the run
    assert again.wait(timeout=LIMIT) == REFUSED
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=LIMIT) == 75
    with records.claimed(tmp_path / "run"):  # it ended with the ranks
        pass


def test_a_command_that_an_error_names_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "a run; of 'mine'"

    def said(verb: str, refuse: Callable[[], object]) -> None:
        with pytest.raises(ValueError) as error:
            refuse()
        command = re.findall(r"`(python -m launch \w.*?)`", str(error.value))[0]
        assert shlex.split(command) == ["python", "-m", "launch", verb, str(run)]

    with records.claimed(run):
        said("status", lambda: records.claimed(run).__enter__())
    lease.claim(run)
    said("stop", lambda: records.check_free(run))
    said("stop", lambda: lease.claim(run))


def test_a_link_to_a_disk_that_is_not_mounted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="is a link to"), records.claimed(tmp_path / "run"):
        pass


def test_a_rank_in_the_shell_is_not_believed(tmp_path: Path) -> None:
    shell = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "elsewhere"}
    assert start(tmp_path, ranks='exit "${WORLD_SIZE:-0}"', **shell).wait(timeout=LIMIT) == 0


def test_a_detached_run_outlives_the_terminal_and_says_how_to_watch_it(tmp_path: Path) -> None:
    ranks = "trap 'exit 75' HUP; touch started; until [ -e go ]; do sleep 0.1; done; echo drawn"
    job = start(tmp_path, "--detach", ranks=f"{ranks}; touch ended")
    said = job.communicate(timeout=LIMIT)[0]
    assert job.returncode == 0
    wait_until((tmp_path / "started").exists, "the ranks")
    assert records.is_claimed(tmp_path / "run")
    assert status.read(tmp_path / "run").health == "starting: the run is not claimed yet"
    with pytest.raises(ProcessLookupError):  # its process group is empty
        os.killpg(job.pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    wait_until((tmp_path / "ended").exists, "the end of the run")
    output = tmp_path / "run" / "launch" / "output.txt"
    assert output.read_text() == "drawn\n"
    for command in (f"tail -F {output}", f"launch status {output.parents[1]}", "launch stop"):
        assert command in said


def start_by_ssh(place: Path, *, setup: str = "true") -> "subprocess.CompletedProcess[str]":
    """Start two machines by torchrun, with stand-ins for python and ssh, which sets HOST."""
    for name, text in {
        "ssh": 'echo "$@" >> ssh.txt; HOST=${@: -2:1} exec bash -c "${*: -1}"',
        "python3": 'echo "$@" >> "$$.rank"',
    }.items():
        (place / name).write_text(f"#!/bin/bash\ncd {place}\n{text}\n")
        (place / name).chmod(0o755)
    (place / "site.toml").write_text(
        f'launcher = "torchrun"\npython = "{place}/python3"\nhosts = ["me@n1", "you@n2"]\n'
        f"setup = {json.dumps([setup])}\n"
    )
    words = ["digits", "--run", place / "run", "--cluster", place / "site.toml", "--nodes", "2"]
    launch = [sys.executable, "-m", "launch", *words]
    return subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)


def test_nothing_starts_where_a_machine_cannot_start_its_ranks(tmp_path: Path) -> None:
    done = start_by_ssh(tmp_path, setup='[ "$HOST" != you@n2 ]')
    assert done.returncode == REFUSED
    first, last = done.stderr.splitlines()
    assert "the setup line failed with status 1: [" in first
    assert last.endswith(": you@n2 cannot start the job, see above")
    assert not list(tmp_path.glob("*.rank"))


def test_torchrun_gets_the_names_of_machines_and_ssh_their_users(tmp_path: Path) -> None:
    assert start_by_ssh(tmp_path).returncode == 0
    reached = (tmp_path / "ssh.txt").read_text()
    assert "me@n1" in reached and "you@n2" in reached
    ranks = sorted(path.read_text() for path in tmp_path.glob("*.rank"))
    assert all("--rdzv-endpoint=n1:" in rank and "@" not in rank for rank in ranks)
    for rank, name, first in zip(ranks, ("n1", "n2"), (1, 0), strict=True):
        assert f"--local-addr={name} " in rank and f"is_host={first} " in rank


@pytest.mark.parametrize(
    ("launcher", "host", "setup", "message"),
    [
        ("torchrun", "nowhere.invalid", STRICT, "ssh to nowhere.invalid failed, see above: "),
        ("deepspeed", "nowhere.invalid", "true", "ssh to nowhere.invalid failed, see above: "),
        ("torchrun", "n1", "PATH=bin", "there is no ssh here: "),
        ("deepspeed", "n1", "PATH=bin", "there is no ssh here: "),
        ("mpirun", "n1", "PATH=bin", "there is no mpirun here: "),
    ],
)
def test_what_a_launcher_lacks_is_refused_before_it_starts(
    launcher: str, host: str, setup: str, message: str, tmp_path: Path
) -> None:
    if host != "n1" and not all(map(shutil.which, ("ssh", "pdsh"))):
        pytest.skip("needs ssh and pdsh")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hostname").symlink_to(shutil.which("hostname") or "/bin/hostname")
    (tmp_path / "site.toml").write_text(
        f'launcher = "{launcher}"\npython = "python3"\nhosts = ["{host}"]\nsetup = ["{setup}"]\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch", "digits", "--run", "run", "--cluster", "site.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == REFUSED
    assert message in done.stderr.splitlines()[-1]


def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "site.toml"
    lines = ["export A=1", "if [ $A = 1 ]; then\n  ls /nowhere/cuda\nfi", "touch later"]
    settings.write_text(f'launcher = "alone"\nsetup = {json.dumps(lines)}\n')
    words = ["digits", "--run", tmp_path / "run", "--cluster", settings]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == REFUSED
    assert "error: the setup line failed with status 2: if [ $A = 1 ]; then" in done.stderr
    assert not (tmp_path / "later").exists()
