"""A stop signal reaches the command that a process waits for, once, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.exits import TO_BE_CONTINUED
from tests.support.ranks import ROOT, wait_for
from trainer.ranks.commands import Commands, on_ranks

# Saves for longer than subprocess.run waits after Ctrl-C, and tells which signals came.
COMMAND = """
import pathlib, signal, sys, time
here, came = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: came.append(signal.Signals(number).name))
(here / "ready").touch()
while not (came and (here / "all came").exists()):
    time.sleep(0.01)
time.sleep(0.3)
(here / "saved").write_text(" ".join(came))
sys.exit(75)
"""
WAITS = """
import sys
from trainer.ranks.commands import Commands
with Commands() as commands:
    status = commands.run([sys.executable, "-c", *sys.argv[1:]])
    sys.exit(f"{status} {commands.run(['false'])}")
"""


@pytest.mark.parametrize(
    ("number", "group", "came"),
    [
        (signal.SIGTERM, False, "SIGTERM"),
        (signal.SIGINT, True, "SIGINT"),  # a terminal's Ctrl-C
        (signal.SIGQUIT, True, "SIGTERM"),
    ],
)
def test_a_signal_is_passed_on_once_and_the_save_is_waited_for(
    number: signal.Signals, group: bool, came: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", WAITS, COMMAND, str(tmp_path)]
    process = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(tmp_path / "ready")
    for _ in range(2):
        (os.killpg if group else os.kill)(process.pid, number)
        time.sleep(0.1)
    (tmp_path / "all came").touch()
    _, said = process.communicate()
    # Nor does another command begin.
    assert said == f"{TO_BE_CONTINUED} {TO_BE_CONTINUED}\n"
    assert (tmp_path / "saved").read_text() == came


def test_a_command_saves_where_what_waits_for_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "all came").touch()
    process = subprocess.Popen([sys.executable, "-c", WAITS, COMMAND, str(tmp_path)], cwd=ROOT)
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "saved")


def test_without_a_signal_a_command_ends_as_it_does() -> None:
    with Commands() as commands:
        assert [commands.run([name]) for name in ("true", "false", "true")] == [0, 1, 0]


def test_ranks_start_at_once_where_the_machine_s_name_has_no_address() -> None:
    """As in a container without a network: torchrun would ask for it again and again."""
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname of.no.address && exec "$@"', "sh"]
    if os.geteuid() or subprocess.run([*renamed, "true"]).returncode:
        pytest.skip("root alone can rename a machine for some processes")
    command = [*renamed, *on_ranks(["platform"], ranks=2)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=80).stdout
    assert len(said.splitlines()) == 2
