"""Where the time of a run went, from its timeline alone; and ranks that hold the others up."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import ranks
from trainer.ranks import process
from trainer.ranks.group import connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join
from trainer.watch import goodput, pace
from trainer.watch.metrics import Metrics, _host_memory
from trainer.watch.mfu import datasheet
from trainer.watch.pace import SlowRanks

#: Seconds for which a rank is suspended.
STOPPED = 2.5


def start(began: float, **facts: object) -> dict:
    return {"event": "start", "time": began + 1, "began": began, **facts}


def training(at: float, images: int) -> dict:
    return {"event": "training", "time": at, "images": images}


def report(at: float, images: int, **spent: float) -> dict:
    return {"event": "report", "time": at, "images": images, "images_per_second": 10.0, **spent}


def end(at: float, state: str) -> dict:
    return {"event": "end", "time": at, "state": state}


#: Submitted at 0; starts at 100; trains from 200, 1000 images each 100 s; is killed at 550, alive
#: until 540; is queued again until 600; resumes at 700 from 2000, where it was at 400.
KILLED = [
    start(100, submitted=0.0),
    training(200, 0),
    report(300, 1000, waiting=10.0),
    report(400, 2000, saving=20.0, saves=1),
    report(500, 3000, saving=50.0, saves=1),
    start(600, submitted=0.0, last_sign=540.0),
    training(700, 2000),
    report(800, 3000, drawing=5.0),
]


def seconds(rows: list, **more: float) -> dict[str, float]:
    found = goodput.account(rows, **more)
    assert found is not None
    return {kind: s for kind, s in found.seconds.items() if s}


def test_what_a_later_start_does_again_is_lost() -> None:
    found = seconds([*KILLED, end(830, "finished")])
    assert found == {
        "queued": 100 + 60, "starting": 100 + 100, "lost": 100 + 40, "waiting for data": 10,
        "saving": 20 + 30, "drawing": 5, "productive": 90 + 80 + 95,
    }  # fmt: skip
    assert sum(found.values()) == 830  # all of the time from the submission on, once


def test_a_checkpoint_between_two_reports_splits_the_interval() -> None:
    resumed = [*KILLED[:5], start(600, last_sign=500.0), training(700, 2500)]
    assert seconds(resumed)["lost"] == 50
    older = [*KILLED, start(900), training(1000, 1000)]  # the checkpoint at 2000 was damaged
    assert seconds(older)["lost"] == 100 + 100 + 40 + 100


def test_a_run_that_still_trains_is_counted_until_now() -> None:
    assert seconds(KILLED, now=900.0)["productive"] == 90 + 80 + 95 + 100
    found = goodput.account(KILLED, now=900.0)
    assert found is not None and found.failures == 1
    dead = goodput.account(KILLED)
    assert dead is not None and dead.failures == 2


def test_time_between_starts_without_a_scheduler_is_no_queue() -> None:
    again = [start(0), training(10, 0), end(20, "stopped"), start(9e6), training(9e6 + 10, 0)]
    assert seconds(again) == {"starting": 20, "saving": 10}


def test_the_advised_interval_weighs_saves_against_failures() -> None:
    found = goodput.account(KILLED, now=900.0)
    assert found is not None
    ran = 900 - 100 - 60
    assert found.advised_interval == pytest.approx((2 * found.save_cost * ran) ** 0.5)
    assert found.save_cost == (20 + 50) / 2  # whether it was lost later or not
    assert "1 failure in 12 min" in found.advice()


@pytest.mark.parametrize(
    "torn", ["", '{"event": "re', "null", '{"event": "report", "time": 1}', "\0"]
)
def test_torn_lines_are_left_out(torn: str, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    goodput.note(tmp_path, "training", images=5)
    with goodput.file(tmp_path).open("a") as file:
        file.write(torn)
    goodput.note(tmp_path, "end", state="finished")
    assert [row["event"] for row in goodput.read(tmp_path)] == ["training", "end"]
    assert goodput.account(goodput.read(tmp_path)) is None


def test_no_two_kinds_of_time_are_more_than_there_was() -> None:
    odd = [start(0), training(0, 0), report(10, 100, waiting=8.0, saving=8.0), end(5, "failed")]
    assert seconds(odd) == {"waiting for data": 5, "saving": 5}


def test_a_rank_is_slow_when_it_stays_behind_the_median_or_its_own_best() -> None:
    slow = SlowRanks(["n1", "n1", "n2", "n2"])
    for now in range(0, 50, 10):
        slow.judge([1.0, 1.1, 1.5 if now else 1.0, 1.0], now=float(now))
        assert slow.is_news == (now == 40)  # three reports and 30 s after it began
    assert slow.text == "rank 2 on n2 (1.50 x the median rank, 1.50 x its own best)"
    slow.judge([1.0, 1.1, 1.0, 1.0], now=60.0)
    assert (slow.text, slow.is_news) == ("", True)
    for now in range(70, 120, 10):  # every rank of a host that throttles
        slow.judge([1.3, 1.4, 1.3, 1.3], now=float(now))
    assert slow.text.count("x its own best") == 4


def test_a_short_disturbance_is_no_slow_rank() -> None:
    slow = SlowRanks(["n1", "n2"])
    for now in range(10):
        slow.judge([1.0, 2.0 if now % 3 else 1.0], now=100.0 * now)
        assert slow.text == ""


class Counted(TorchDispatchMode):
    """Counts the operations that make new tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def terms(step: int, rank: int) -> dict[str, Tensor]:
    """What an objective gives for three images, none with a timestep of the last quarter."""
    drawn = torch.Generator().manual_seed(10 * step + rank)
    loss, acc1 = torch.rand(2, 3, generator=drawn)
    return {"loss": loss, "acc1": acc1, "t": torch.randint(0, 75, (3,), generator=drawn)}


def add_steps(counts: tuple[int, ...]) -> int:
    """Intervals of so many steps on two ranks; prints their means and the operations of a step."""
    world = join()
    with connected(world, patience=ranks.LIMIT) as device:
        metrics = Metrics(world=world, device=device, timesteps=100, clock=process.RunningClock())
        for count in counts:
            given = [[terms(2 * step + n, world.rank) for n in range(2)] for step in range(count)]
            with Counted() as counted:
                for step, micro_batches in enumerate(given):
                    metrics.add(micro_batches)
                    metrics.note("lr", float(step))
                    metrics.note("bad_share", world.rank, count=6)
            values = metrics.reduce(images=12)
            print(json.dumps({**values, "operations": counted.count}))
    return 0


def test_metrics_are_means_over_all_ranks_and_cost_a_step_no_operations(tmp_path: Path) -> None:
    """Also where more steps were taken than are kept."""
    counts = (3, 140)
    job = ranks.fork(tmp_path, partial(add_steps, counts), ranks=2)
    job.wait()
    for text in job.texts:
        for count, line in zip(counts, text.splitlines()[-len(counts) :], strict=True):
            values = json.loads(line)
            seen = [terms(n, rank) for n in range(2 * count) for rank in range(2)]
            loss, t = (torch.cat([each[name] for each in seen]) for name in ("loss", "t"))
            assert values["loss"] == pytest.approx(float(loss.double().mean()))
            for q in range(3):
                expected = float(loss[t // 25 == q].double().mean())
                assert values[f"loss/q{q}"] == pytest.approx(expected)
            assert "loss/q3" not in values and "acc1/q0" not in values and "t" not in values
            assert values["lr"] == (count - 1) / 2 and values["bad_share"] == 1 / 12
            assert values["operations"] <= (0 if count < 100 else 40)


class Clock:
    """Stands for the module `time`: what a machine is busy with besides changes no duration."""

    CLOCK_BOOTTIME, now = 0, 0.0

    def monotonic(self) -> float:
        return self.now

    def clock_gettime(self, _clock: int) -> float:
        return self.now


def work() -> int:
    """Two ranks of which the second computes slowly."""
    world, pace.SECONDS, clock = join(), 0.0, Clock()
    pace.time = process.time = clock  # type: ignore[assignment,attr-defined]
    with connected(world, patience=ranks.LIMIT) as device:
        metrics = Metrics(world=world, device=device, timesteps=10, clock=process.RunningClock())
        for _ in range(pace.REPORTS + 1):
            with metrics.forward.running():
                clock.now += 0.8 if world.rank else 0.2
            metrics.note("data_wait_seconds", 0.001)
            began = metrics.clock()
            clock.now += 0.25
            metrics.pause(began, on="saving")
            values = metrics.reduce(images=2)
        print(json.dumps({**values, "slow": metrics.slow.text}))
    return 0


def test_the_slow_rank_is_named_with_its_host_by_every_rank(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, work, ranks=2)
    job.wait()
    for text in job.texts:
        values = json.loads(text.splitlines()[-1])
        assert "rank 1 on " in values["slow"] and "rank 0" not in values["slow"]
        assert values["slowest_rank"] > pace.SLOW
        assert values["saving_seconds"] >= 0.25
        assert 0 < values["data_wait_share"] < 0.1
        assert values["host_memory_gib"] > 0.01


def be_suspended_twice() -> int:
    """A rank that is stopped as it waits for data, and again as it saves."""
    world, process.STOPPED_FOR = join(), STOPPED / 2
    with (
        connected(world, patience=ranks.LIMIT) as device,
        Watchdog(world, patience=ranks.LIMIT) as watchdog,
    ):
        metrics = Metrics(world=world, device=device, timesteps=10, clock=watchdog.clock)
        for work in ("waiting", "saving"):
            began = metrics.clock()
            os.kill(os.getpid(), signal.SIGSTOP)
            if work == "saving":
                metrics.pause(began, on=work)
            else:
                metrics.note("data_wait_seconds", metrics.clock() - began)
            print(json.dumps(metrics.reduce(images=1)))
    return 0


def test_time_in_which_the_job_was_suspended_is_in_no_rate_and_counted_once(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, be_suspended_twice, ranks=1)
    (rank,) = job.ranks
    for _ in range(2):
        while "(stopped)" not in Path(f"/proc/{rank.pid}/status").read_text():
            time.sleep(0.1)
        time.sleep(STOPPED)
        job.signal(0, signal.SIGCONT)
    waiting, saving = map(json.loads, job.wait().splitlines()[-2:])
    assert waiting["suspended_seconds"] >= STOPPED and saving["suspended_seconds"] >= STOPPED
    assert waiting["interval_seconds"] < STOPPED and waiting["images_per_second"] > 1 / STOPPED
    assert waiting["data_wait_share"] <= 1
    assert saving["saving_seconds"] + saving["interval_seconds"] < STOPPED


def test_names_of_devices_have_their_own_peak() -> None:
    assert datasheet("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet("NVIDIA H100 PCIe") == 756e12
    assert datasheet("NVIDIA A100-SXM4-40GB") == 312e12
    assert datasheet("Tesla T4") == 65e12 and datasheet("NVIDIA L40S") == 362e12
    # No peak is better than that of a device whose name begins alike, or of a default.
    unknown = ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA H20")
    for name in (*unknown, "AMD Instinct MI355X", "NVIDIA GeForce GTX 1080"):
        assert datasheet(name) is None, name


def test_host_memory_is_what_the_process_and_its_workers_hold() -> None:
    before = _host_memory()
    held = b"x" * 2**28
    worker = subprocess.Popen(
        [sys.executable, "-c", "x = b'x' * 2**28; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None and worker.stdout.readline()
    assert 0.5 < _host_memory() - before < 0.6 and len(held) == 2**28
    worker.communicate(b"\n")
