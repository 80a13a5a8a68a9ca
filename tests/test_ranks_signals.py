"""A stop signal is a wish that the ranks agree on; only an insistent Ctrl-C interrupts."""

import os
import signal
import subprocess
import sys

import pytest

from data.exits import TO_BE_CONTINUED
from tests.support.cluster import ROOT
from trainer.ranks import signals
from trainer.ranks.signals import Preemption


def test_a_signal_is_remembered_and_a_repeated_one_harmless() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert not preemption.stop_requested
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert preemption.stop_requested
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_while_the_first_is_announced_is_the_same_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A terminal gives it to torchrun and to the ranks, and torchrun passes it on."""
    monkeypatch.setattr(os, "write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.stop_requested


def test_an_insistent_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with Preemption(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_process_records_signals_early_and_is_not_killed_as_it_ends() -> None:
    code = (
        "import os, signal\n"
        "from trainer.ranks.signals import Preemption\n"
        "early = Preemption()\n"
        "early.record_early()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with early as preemption:\n"
        "    assert preemption.stop_requested\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(pid, number)\n"
        "os.last = Last()\n"  # goes with the modules, when Python has taken its handlers back
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = "\nstop requested: the run saves and stops after this step\n"
    assert (done.returncode, done.stderr) == (0, said)


def test_a_rank_saves_where_its_torchrun_and_the_terminal_are_gone() -> None:
    # What is forked has another parent than what asked for its own.
    code = (
        "import os\n"
        "from trainer.ranks.signals import Preemption\n"
        "preemption, (reader, writer) = Preemption(), os.pipe()\n"
        "os.dup2(writer, 2), os.close(reader)\n"
        "if rank := os.fork():\n"
        "    os._exit(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))\n"
        f"os._exit({TO_BE_CONTINUED} if preemption.stop_requested else 1)\n"
    )
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert done.returncode == TO_BE_CONTINUED
