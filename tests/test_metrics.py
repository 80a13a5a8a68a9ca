"""What is measured of a run's steps: means, rates, waits; and ranks that hold the others up."""

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
from trainer.adm.timesteps import LossSecondMoment
from trainer.config import experiment as configs
from trainer.engine import compute
from trainer.planning import costs
from trainer.ranks import process
from trainer.ranks.process_group import connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join
from trainer.run import goodput
from trainer.seen import learn_timesteps
from trainer.watch import pace
from trainer.watch.metrics import Metrics, _host_memory
from trainer.watch.mfu import Mfu, datasheet

#: Seconds for which a rank is suspended.
STOPPED = 2.5


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


def seen(micro_batch: int, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Indices and terms of three images; two ranks have every other image of a step."""
    found = terms(micro_batch, rank)
    indices = 6 * micro_batch + 2 * torch.arange(3) + rank
    return indices, {"t": found["t"] % 2, "unweighted": found["loss"]}


def add_steps(counts: tuple[int, ...]) -> int:
    """Intervals of so many steps on two ranks; prints their means and the operations of a step."""
    world = join()
    with connected(world, patience=ranks.LIMIT) as device:
        metrics = Metrics(world=world, device=device, timesteps=100, clock=process.RunningClock())
        sampler = LossSecondMoment(100, seed=0)
        learn_timesteps(sampler, [seen(n, world.rank) for n in range(2)])
        print(json.dumps(sampler.state()))
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
    learned = LossSecondMoment(100, seed=0)
    both = [seen(n, rank) for n in range(2) for rank in range(2)]
    indices, t, losses = (
        torch.cat(c) for c in zip(*[(i, s["t"], s["unweighted"]) for i, s in both], strict=True)
    )
    for place in indices.argsort():
        learned.update(t[place][None], losses[place][None])
    for text in job.texts:
        # The losses of all ranks in the order of the images, on any number of ranks.
        assert json.loads(text.splitlines()[-1 - len(counts)]) == learned.state()
        for count, line in zip(counts, text.splitlines()[-len(counts) :], strict=True):
            values = json.loads(line)
            each_part = [terms(n, rank) for n in range(2 * count) for rank in range(2)]
            loss, t = (torch.cat([part[name] for part in each_part]) for name in ("loss", "t"))
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
        wall = time.monotonic()
        metrics = Metrics(world=world, device=device, timesteps=10, clock=watchdog.clock)
        for work in ("waiting", "saving"):
            began = metrics.clock()
            os.kill(os.getpid(), signal.SIGSTOP)
            if work == "saving":
                metrics.pause(began, on=work)
            else:
                metrics.note("data_wait_seconds", metrics.clock() - began)
            values = metrics.reduce(images=1)
            before, wall = wall, time.monotonic()
            print(json.dumps({**values, "wall_seconds": wall - before}))
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
    for values in (waiting, saving):
        assert values["suspended_seconds"] >= STOPPED
        parts = [values.get(f"{part}_seconds", 0) for part in ("interval", "saving", "suspended")]
        assert sum(parts) <= values["wall_seconds"] + 1.0
        assert values["images_per_second"] == pytest.approx(1 / values["interval_seconds"])
    assert waiting["data_wait_share"] <= 1


def compile_for_a_second(directory: Path, runs: list[list[str]]) -> int:
    """A stand-in for the compiler, which needs a GPU: the first pass takes a second."""

    def compile_forward(net: Any, **_: object) -> None:
        forward, waits = net.forward, iter([1.0])
        net.forward = lambda *x, **y: (time.sleep(next(waits, 0.0)), forward(*x, **y))[1]

    compute.is_compiled = lambda *_, **__: True
    compute.compile_forward = compile_forward
    return ranks.work(directory, runs, fp16=False)


def test_the_time_of_compiling_is_in_no_rate_and_named(tmp_path: Path, tiny: Path) -> None:
    run, here = tmp_path / "run", tmp_path / "job"
    words = ["train", str(tiny), "--run", str(run), "--set", "training.images = 16"]
    job = ranks.fork(here, partial(compile_for_a_second, here, [words]), ranks=1)
    job.wait()
    assert job.statuses == [0]
    first, second = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert first["compiling_seconds"] >= 1.0 and "compiling_seconds" not in second
    begun, *reports = [row for row in goodput.read(run) if row["event"] in ("training", "report")]
    assert [row.get("compiling", 0.0) >= 1.0 for row in reports] == [True, False]
    passed = reports[0]["time"] - begun["time"]
    assert first["compiling_seconds"] + first["interval_seconds"] <= passed + 1.0


def test_names_of_devices_have_their_own_peak() -> None:
    assert datasheet("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet("NVIDIA H100 PCIe") == 756e12
    assert datasheet("NVIDIA A100-SXM4-40GB") == 312e12
    assert datasheet("NVIDIA B300 SXM6 AC") == 2250e12 and datasheet("NVIDIA GB300") == 2500e12
    assert datasheet("NVIDIA H20") == 148e12 and datasheet("AMD Instinct MI350X") == 2300e12
    assert datasheet("Tesla T4") == 65e12 and datasheet("NVIDIA L40S") == 362e12
    # No peak is better than that of a device whose name begins alike, or of a default.
    unknown = ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA H200X")
    for name in (*unknown, "AMD Instinct MI210", "NVIDIA GeForce GTX 1080"):
        assert datasheet(name) is None, name
    # Nor that of the whole device, or of a larger one of the same name.
    assert datasheet("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert datasheet("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_utilisation_is_of_all_ranks_and_of_three_passes() -> None:
    name = "NVIDIA H100 80GB HBM3"
    config = configs.load("digits", ['training.precision = "bf16"'])
    found = Mfu.of(config, name=name, ranks=16, measured=1e15)
    needed = 3 * costs.of_network(config.model).forward_flops * 100.0
    shares = {"mfu_measured": needed / 1e15, "mfu_datasheet": needed / (16 * 989e12)}
    assert found.shares(100.0) == pytest.approx(shares)
    for other in (configs.load("digits", ['training.precision = "fp32"']), config):
        name = "CPU" if other is config else name
        assert Mfu.of(other, name=name, ranks=16, measured=1e15).datasheet is None


def growth() -> None:
    """Print by how many GiB memory grows with 0.25 here and as much in a worker."""
    before = _host_memory()
    held = b"x" * 2**28
    worker = subprocess.Popen(
        [sys.executable, "-c", "x = b'x' * 2**28; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None and worker.stdout.readline()
    print(_host_memory() - before, len(held))
    worker.communicate(b"\n")


def test_host_memory_is_what_the_process_and_its_workers_hold() -> None:
    """By a process of its own: what other tests have started may end meanwhile."""
    words = [sys.executable, "-c", "from tests.test_metrics import growth; growth()"]
    done = subprocess.run(
        words, cwd=ranks.ROOT, capture_output=True, text=True, timeout=ranks.LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout.split()[0]) < 0.6
