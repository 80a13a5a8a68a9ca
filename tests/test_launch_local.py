"""A run without a scheduler: the status and the signals that the user's shell sees."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, wait_until

SAVES_ON_CTRL_C = """\
trap 'sleep 1; touch saved; exit 75' INT
touch started
for try in {1..600}; do sleep 0.1; done"""


def start(directory: Path, *, ranks: str, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a run whose interpreter does as `ranks` says, in bash, in `directory`."""
    python, settings = directory / "python", directory / "site.toml"
    python.write_text(f"#!/bin/bash\n{ranks}\n")
    python.chmod(0o755)
    settings.write_text(f'launcher = "alone"\npython = "{python}"\n')
    words = ["digits", "--run", directory / "run", "--cluster", settings]
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, which bash could not trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("status", [0, 1, 75, 78])
def test_the_exit_status_is_that_of_the_run(status: int, tmp_path: Path) -> None:
    assert start(tmp_path, ranks=f"exit {status}").wait(timeout=60) == status


def test_ctrl_c_lets_the_ranks_save(tmp_path: Path) -> None:
    job = start(tmp_path, ranks=SAVES_ON_CTRL_C)
    wait_until((tmp_path / "started").exists, "the ranks", limit=60)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "saved").exists()


def test_a_rank_in_the_shell_is_not_believed(tmp_path: Path) -> None:
    shell = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "elsewhere"}
    assert start(tmp_path, ranks='exit "${WORLD_SIZE:-0}"', **shell).wait(timeout=60) == 0
