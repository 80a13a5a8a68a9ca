"""A job that is suspended, as by a scheduler, goes on: its watchdog does not take it for lost."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from data import progress
from tests.support import ranks
from trainer import evaluate
from trainer.ranks.process_group import connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join

PATIENCE = 10.0


def be_suspended(directory: Path) -> int:
    """Two ranks, of which the main one waits in a collective as both are stopped."""
    world = join()
    with (
        connected(world, patience=ranks.LIMIT),
        Watchdog(world, patience=PATIENCE) as watchdog,
    ):
        if not world.is_main:
            (directory / "ready").touch()
            time.sleep(PATIENCE / 2)
        dist.barrier()
        end = time.monotonic() + ranks.LIMIT
        while (paused := watchdog.clock.stopped) == 0 and time.monotonic() < end:
            time.sleep(0.1)
            watchdog.mark("computing")
        return 0 if 2 * PATIENCE <= paused < 2 * ranks.LIMIT else 1


@pytest.mark.slow
def test_a_job_that_was_suspended_for_longer_than_the_patience_goes_on(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(be_suspended, tmp_path), ranks=2)
    ranks.wait_for(tmp_path / "ready")
    for number, pause in ((signal.SIGSTOP, 2 * PATIENCE), (signal.SIGCONT, 0)):
        for rank in (0, 1):
            job.signal(rank, number)
        time.sleep(pause)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text


def measure_suspended(words: list[str]) -> int:
    """Says how far it is at each pass, not once a minute."""
    progress._EVERY = 0.0
    return evaluate.main(words)


@pytest.mark.slow
def test_an_evaluation_does_not_count_the_time_for_which_it_was_suspended(
    tmp_path: Path, weights: dict[str, list[str]], digits: Path
) -> None:
    words = ["nll", *weights["unet"], "--data", str(digits), "--images", "8", "--batch", "1"]
    job = ranks.fork(tmp_path, partial(measure_suspended, [*words, "--steps", "50"]), ranks=1)

    def rates() -> list[float]:
        return [float(rate) for rate in re.findall(r", ([\d.]+) a second", job.text)]

    while len(rates()) < 100:
        assert job.ranks[0].is_alive(), job.text
        time.sleep(0.05)
    job.signal(0, signal.SIGSTOP)
    time.sleep(3 * PATIENCE)
    count, before = len(rates()), rates()[-1]
    job.signal(0, signal.SIGCONT)
    job.wait()
    # For a second, until the clock is read, the pause may show.
    assert before / 3 < rates()[-1] and len(rates()) > count, (before, rates()[count:])


class LateWatchdog(Watchdog):
    """Its process is stopped before its threads run, which then are slow."""

    def _watch(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        super()._watch()

    def _exchange_reports(self) -> None:
        time.sleep(4.0)
        super()._exchange_reports()


def be_suspended_at_once(directory: Path) -> int:
    world = join()
    with (
        connected(world, patience=ranks.LIMIT),
        LateWatchdog(world, patience=PATIENCE) as watchdog,
    ):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            watchdog.mark("computing")
            time.sleep(0.1)
        (directory / "done").touch()
    return 0


@pytest.mark.slow
def test_a_job_that_is_suspended_as_its_watchdog_begins_goes_on(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(be_suspended_at_once, tmp_path), ranks=1)
    stat = Path(f"/proc/{job.ranks[0].pid}/stat")
    end = time.monotonic() + ranks.LIMIT
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, job.text
        time.sleep(0.1)
    time.sleep(2 * PATIENCE)
    job.signal(0, signal.SIGCONT)
    job.wait()
    assert job.ranks[0].exitcode == 0 and (tmp_path / "done").exists(), job.text
