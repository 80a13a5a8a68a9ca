"""Disks that are full, fail or lack a directory: what they cost a run, and what is said."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import files
from data.dataset import open_shards
from data.exits import FAILED
from data.manifest import MANIFEST
from tests.support import faults, ranks
from tests.support.runs import ENDLESS, EVERY, STEP, Place, equal
from trainer.config.sections import IntervalConfig
from trainer.ranks.world import World
from trainer.run import checkpoint as checkpoints
from trainer.run.directory import Run
from trainer.run.runstate import RunState, committed
from trainer.saver import Saver
from trainer.weights import compare


@pytest.fixture
def bare(tmp_path: Path, tiny: Path) -> Place:
    return Place(tmp_path, tiny)


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + ranks.LIMIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def fill(job: ranks.Job, size: int = 0) -> None:
    """No file of the job's ranks may become larger, as on a disk that is full; -1: any may."""
    for process in job.ranks:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, -1))


def limited(directory: Path, arguments: list, size: int) -> int:
    """Train where no file may become larger, but for what is printed, which `cat` writes."""
    shown = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert shown.stdin is not None
    for stream in (1, 2):
        os.dup2(shown.stdin.fileno(), stream)
    shown.stdin.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    return ranks.work(directory, [arguments], False)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data.shards", "intervals.validate = 12\ndata.validation"])
def test_shards_that_take_the_place_of_a_run_s_own_end_it_before_it_saves(
    bare: Place, digits: Path, place: str
) -> None:
    shards = shutil.copytree(digits, bare.root / "shards")
    sets = (*EVERY, *ENDLESS, f'{place} = "{shards}"')
    job = ranks.start(bare.root / "job", ranks=1, runs=[bare.arguments("run", sets=sets)])
    ranks.wait_for(bare.run("run") / "checkpoints" / f"{STEP:012d}")
    manifest = shards / MANIFEST
    own = open_shards(shards, check_files=False).fingerprint
    files.write(manifest, manifest.read_text().replace(own, own[::-1]))  # the last file to change
    job.wait()
    (said,) = job.statuses
    assert said.startswith(f"{shards} has other shards now than when this start opened it: "), said
    state = RunState.read(bare.run("run"))
    assert state is not None and state.state == "refused"


def test_training_does_not_wait_for_a_disk_that_hangs(bare: Place) -> None:
    run, steps = bare.run("hangs"), 8
    run.mkdir()
    os.mkfifo(run / "log.txt")  # who opens it hangs until it is read
    sets = ("intervals.checkpoint = 1000000", f"training.images = {steps * STEP}")
    job = ranks.start(bare.root / "job", ranks=2, runs=[bare.arguments("hangs", sets=sets)])
    until(lambda: f"images {steps * STEP} of" in job.texts[0] or not job.ranks[0].is_alive())
    assert not (run / "metrics.jsonl").exists() and job.ranks[0].is_alive()  # nothing else passes
    read = os.open(run / "log.txt", os.O_RDWR)
    job.wait()
    assert job.statuses == [0]
    shown = [line for line in job.texts[0].splitlines() if line[:2] == "20"]
    assert os.read(read, 2**16).decode().splitlines() == shown
    os.close(read)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    assert bare.checkpoint("hangs", steps * STEP)


def test_training_goes_on_while_the_disk_is_full(bare: Place) -> None:
    checkpoints = bare.run("filled") / "checkpoints"
    arguments = bare.arguments("filled", sets=(*EVERY, *ENDLESS))
    job = ranks.start(bare.root / "filled-job", ranks=2, runs=[arguments])
    ranks.wait_for(checkpoints / f"{STEP:012d}")
    fill(job)
    before = max(p.name for p in checkpoints.iterdir() if p.name.isdigit())
    for _ in range(2):  # a save begins, fails and frees what it wrote
        until(lambda: list(checkpoints.glob(".*.partial")))
        until(lambda: not list(checkpoints.glob(".*.partial")))
    fill(job, size=-1)
    until(lambda: max(p.name for p in checkpoints.iterdir() if p.name.isdigit()) > before)
    job.signal(0, signal.SIGTERM)
    job.wait()
    assert job.statuses == [75]
    for what in ("log.txt", "metrics.jsonl", "tensorboard/", "launch/state.json"):
        assert f"{what} of {bare.run('filled')} is written again" in job.texts[0]
    assert "failed:" not in job.text and "Traceback" not in job.text
    rows = [json.loads(line) for line in (bare.run("filled") / "metrics.jsonl").open()]
    clocks = [row["images"] for row in rows]
    assert clocks == list(range(STEP, clocks[-1] + 1, STEP))  # also those without room
    (curves,) = (bare.run("filled") / "tensorboard").glob("events*")
    events = EventAccumulator(str(curves), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == clocks
    last = max(int(p.name) for p in checkpoints.iterdir())
    longer = (*EVERY, *ENDLESS[1:], f"training.images = {last}")
    assert bare.train(bare.arguments("longer", sets=longer), world=2) == [0]
    assert equal(bare.checkpoint("filled", last), bare.checkpoint("longer", last))


def without_room(directory: Path, arguments: list, bad: int, file: Path) -> int:
    """Train with a bad image; a directory stands where the row of it is to be written."""
    from trainer.guards.incidents import Incidents

    keep: Callable[..., None] = Incidents._keep

    def kept(self: Incidents, entry: object) -> None:
        if self.parts.world.is_main:
            file.mkdir()
        keep(self, entry)

    Incidents._keep = kept  # type: ignore[method-assign,assignment]
    return faults.work(directory, [arguments], {bad: math.nan}, False)


def test_what_is_kept_of_a_refused_step_waits_for_room(bare: Place) -> None:
    bad, file = 2 * STEP, bare.run("incident") / "incidents.jsonl"
    sets = (*ENDLESS, f"intervals.checkpoint = {400 * STEP}")
    arguments = bare.arguments("incident", sets=sets)
    task = partial(without_room, bare.root / "incident-job", arguments, bad, file)
    job = ranks.fork(bare.root / "incident-job", task, ranks=2)
    until(lambda: f"cannot write incidents.jsonl of {bare.run('incident')}" in job.texts[0])
    file.rmdir()
    ranks.wait_for(file)
    job.signal(0, signal.SIGTERM)
    job.wait()
    (row,) = [json.loads(line) for line in file.open()]
    assert row["images"] == bad and row["worst"][0]["image"] == bad


def test_a_run_without_checkpoints_for_too_long_ends_on_all_ranks(bare: Place) -> None:
    arguments = bare.arguments("unsaved", sets=(*EVERY, "intervals.unsaved_minutes = 0"))
    task = partial(limited, bare.root / "unsaved-job", arguments, 2**16)
    job = ranks.fork(bare.root / "unsaved-job", task, ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    said = "error: no checkpoint could be written for intervals.unsaved_minutes = 0: rank "
    until(lambda: said in job.text)
    assert job.text.count(said) == 1 and "Traceback" not in job.text
    rows = (bare.run("unsaved") / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= 2  # the first failure did not end it


def test_a_full_disk_at_the_start_is_one_line_that_names_the_file(bare: Place) -> None:
    task = partial(limited, bare.root / "claim-job", bare.arguments("claim"), 100)
    job = ranks.fork(bare.root / "claim-job", task, ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    until(lambda: job.texts[0].endswith("\n"))  # it goes through another process
    file = bare.run("claim") / "launch" / "writer.json"
    assert job.texts[0] == f"error: rank 0: {file}: File too large\n"


def test_a_checkpoint_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    saver = Saver(Run(tmp_path), world=World(), intervals=IntervalConfig(log=1, checkpoint=1))
    (tmp_path / "checkpoints").mkdir()
    huge = SimpleNamespace(kinds=("model", "ema-0.9"), parameter_count=10**15)
    with pytest.raises(OSError, match=r"a checkpoint takes 7450580.60 GiB, and .* are free"):
        saver._require_room(huge)
    saver._require_room(SimpleNamespace(kinds=("model",), parameter_count=10))


def test_what_is_newer_than_a_commit_is_not_counted_and_stays(tmp_path: Path) -> None:
    """It is damaged, and could not be moved away."""
    intervals = IntervalConfig(log=1, checkpoint=1, keep=1)
    saver = Saver(Run(tmp_path), world=World(), intervals=intervals)
    for clock in (1, 2, 3):
        (tmp_path / "checkpoints" / f"{clock:012d}").mkdir(parents=True)
    saver._prune(until=2)
    left = committed(tmp_path / "checkpoints")
    assert [int(path.name) for path in left] == [3, 2]


def test_a_slow_disk_is_no_rank_that_hangs(tmp_path: Path) -> None:
    """While a checkpoint's files grow the watchdog hears of it; while they do not it does not."""
    marks: list[str] = []
    saver = Saver(
        Run(tmp_path),
        world=World(),
        intervals=IntervalConfig(log=1, checkpoint=1),
        mark=marks.append,
    )
    file = tmp_path / "checkpoints" / ".000000000001.partial" / "model.safetensors"
    file.parent.mkdir(parents=True)
    for sizes, heard in ((range(1, 5), 4), ([9] * 5, 1)):
        marks.clear()
        looks = iter(sizes)
        thread = SimpleNamespace(
            is_alive=lambda looks=looks: looks.__length_hint__() > 0,
            join=lambda _, looks=looks: file.write_bytes(b"x" * next(looks)),
        )
        saver._wait_for(thread)
        assert marks == ["saving"] * heard


def test_a_link_to_nowhere_is_named(bare: Place) -> None:
    bare.run("linked").symlink_to(bare.root / "unmounted")
    (status,) = bare.train(bare.arguments("linked"), world=2)
    assert (
        status == f"{bare.run('linked')} is a link to {bare.root}/unmounted, which does not exist"
    )


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    state = {"images": 8, "engine": {}, "timesteps": {}, "order": {}}
    state["files"] = {"model.safetensors": {"bytes": 0, "sha256": "0"}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    os.symlink("/proc/self/mem", tmp_path / "model.safetensors")  # reads as EIO
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.fault_of(tmp_path, kinds=["model"])


def test_a_file_that_reads_back_differently_is_no_checkpoint(tmp_path: Path) -> None:
    file, tensors = tmp_path / "model.safetensors", {"weight": torch.ones(1000)}
    save_file(tensors, file)
    compare(file, tensors)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="weight reads back differently"):
        compare(file, tensors)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    files.append(file, "first\n")
    for write in (files.append, files.write):
        with faults.full_disk(10), pytest.raises(OSError, match=r"File too large: '.*log\.txt'"):
            write(file, "a second line\n")
    files.append(file, "third\n")
    assert file.read_text() == "first\nthird\n"


def without_lease(directory: Path, arguments: list, at: int) -> int:
    """Train, while the file of the lease cannot be read as averages are stored at a clock."""
    from trainer.snapshots import Snapshots

    take: Callable[..., float] = Snapshots.take

    def taken(self: Snapshots, source: object, *, images_seen: int, **named: object) -> float:
        file = self._run.path / "launch" / "writer.json"
        aside = file.with_suffix(".aside")
        if fails := self._world.is_main and images_seen == at:
            file.rename(aside)
            file.mkdir()
        seconds = take(self, source, images_seen=images_seen, **named)
        if fails:
            file.rmdir()
            aside.rename(file)
        return seconds

    Snapshots.take = taken  # type: ignore[method-assign,assignment]
    return ranks.work(directory, [arguments], fp16=False)


def test_a_disk_that_fails_for_a_moment_costs_the_averages_of_that_moment(bare: Place) -> None:
    sets = ("training.ema_widths = [0.1]", f"intervals.averages = {2 * STEP}")
    task = partial(without_lease, bare.root / "moment-job", bare.arguments("moment", sets=sets))
    job = ranks.fork(bare.root / "moment-job", partial(task, 4 * STEP), ranks=2)
    job.wait()
    assert job.statuses == [0]
    assert f"averages of image {4 * STEP} are not kept: " in job.text
    kept = sorted(path.name for path in (bare.run("moment") / "averages").iterdir())
    assert kept == [f"{2 * STEP:012d}", f"{6 * STEP:012d}"]
