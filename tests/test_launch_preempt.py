"""A stop signal is a wish that the ranks agree on; only an insistent Ctrl-C interrupts."""

import os
import signal

import pytest

from launch import preempt
from launch.preempt import Preemption


def test_a_signal_is_remembered_and_a_repeated_one_harmless() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert preemption.requested is None
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert preemption.requested == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_insistent_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "PATIENCE", 0.0)
    with Preemption(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
