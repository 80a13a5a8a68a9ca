"""Checkpoints of real runs: what is damaged, cannot be written or removed, or comes too late."""

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from data.exits import FAILED
from tests.support import ranks
from tests.support.runs import END, EVERY, HALF, STEP, Place, equal
from trainer.config import experiment as configs
from trainer.run.checkpoint import best, fault_of, superseded
from trainer.run.directory import Run
from trainer.run.runstate import committed


def names(run: Path) -> list[int]:
    """The clocks of a run's committed checkpoints."""
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a state.json as a person with an editor does."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state, indent=1))


def test_a_checkpoint_of_a_later_release_is_not_taken_for_damaged(place: Place) -> None:
    place.fork("2x2", "later", images=HALF)
    newest = place.run("later") / "checkpoints" / f"{HALF:012d}"
    edit(newest, lambda state: state.update(format="checkpoint-9") or state.pop("sha256"))
    (said,) = place.train(place.arguments("later", sets=EVERY), world=2)
    assert said == f"{newest} is of a later release (format = 'checkpoint-9'): resume with that one"
    assert newest.is_dir()


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(place: Place) -> None:
    place.fork("2x2", "others", images=HALF)
    newest = place.run("others") / "checkpoints" / f"{HALF:012d}"
    (newest / "state.json").chmod(0)
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            fault_of(newest)
    finally:
        os.seteuid(own)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_harms_nothing(
    place: Place,
) -> None:
    place.fork("2x2", "full", images=HALF)
    before = place.checkpoint("full", HALF)
    arguments = place.arguments("full", sets=EVERY)
    task = partial(with_little_room, place.root / "full-job", arguments)
    job = ranks.fork(place.root / "full-job", task, ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    assert job.text.count("error: the last checkpoint could not be written: rank ") == 1
    said = re.findall("no checkpoint could be .*", place.log("full"))
    assert ["the next save is due in " in line for line in said] == [True, True, False]
    assert names(place.run("full"))[-1] == HALF
    assert equal(place.checkpoint("full", HALF), before)


def with_little_room(directory: Path, arguments: list) -> int:
    """Train where no file may be larger than a megabyte, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    return ranks.work(directory, [arguments], False)


def test_a_damaged_checkpoint_is_skipped(place: Place) -> None:
    place.fork("2x2", "torn", images=5 * STEP)
    checkpoints = place.run("torn") / "checkpoints"
    torn = checkpoints / f"{5 * STEP:012d}" / "ema-0.5.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = checkpoints / f"{4 * STEP:012d}" / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    (checkpoints / f".{6 * STEP:012d}.partial").mkdir()
    assert place.train(place.arguments("torn"), world=2) == [0]
    log = place.log("torn")
    assert "ema-0.5.safetensors has" in log and "model.safetensors does not match" in log
    assert f"resumes from checkpoint {HALF:012d}" in log
    assert equal(place.checkpoint("torn", END), place.checkpoint("2x2", END))


def test_a_damaged_newer_checkpoint_takes_no_place_of_a_good_one(place: Place) -> None:
    place.fork("2x2", "aged", images=5 * STEP)
    checkpoints = place.run("aged") / "checkpoints"
    torn = checkpoints / f"{5 * STEP:012d}" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    for older in range(2, 5):
        shutil.rmtree(checkpoints / f"{older * STEP:012d}")
    sets = (*EVERY, "intervals.keep = 1", f"training.images = {3 * STEP}")
    assert place.train(place.arguments("aged", sets=sets), world=2) == [0]
    assert names(place.run("aged")) == [3 * STEP]
    assert (checkpoints / f"{5 * STEP:012d}.damaged" / torn.name).exists()


def test_a_state_that_was_edited_or_renamed_is_skipped_for_the_next_older_one(place: Place) -> None:
    place.fork("2x2", "edited", images=HALF)
    checkpoints = place.run("edited") / "checkpoints"
    shutil.copytree(checkpoints / f"{STEP:012d}", checkpoints / f"{4 * STEP:012d}")
    edits: dict[int, Callable[[dict], object]] = {
        1: lambda state: state.update(images=STEP + 8),
        2: lambda state: state["engine"].update(updates=4),
        3: lambda state: state.update(files={}),
    }
    for number, change in edits.items():
        edit(checkpoints / f"{number * STEP:012d}", change)
    assert "no checkpoint of" in place.train(place.arguments("edited"), world=2)[0]
    log = place.log("edited")
    assert log.count("state.json: it does not match its own checksum") == 3
    assert "images = 12: must be 48, as the directory is named" in log


def test_a_state_of_version_0_1_resumes_but_not_if_it_lacks_something(place: Place) -> None:
    place.fork("2x2", "older", images=HALF)
    checkpoints = place.run("older") / "checkpoints"
    for number in (1, 2, 3):
        edit(checkpoints / f"{number * STEP:012d}", lambda state: state.pop("sha256"))
    edit(checkpoints / f"{3 * STEP:012d}", lambda state: state.pop("engine"))
    edit(checkpoints / f"{2 * STEP:012d}", lambda state: state["files"].pop("adam-v.safetensors"))
    assert place.train(place.arguments("older"), world=2) == [0]
    log = place.log("older")
    assert "engine = None: must be of type dict" in log
    assert "state.json lists no adam-v" in log
    assert f"resumes from checkpoint {STEP:012d}" in log
    assert equal(place.checkpoint("older", END), place.checkpoint("2x2", END))


def test_a_config_that_was_edited_in_the_run_is_compared_with_what_was_trained(
    place: Place,
) -> None:
    """As the preset of the next start it would be compared with itself."""
    place.fork("2x2", "resettled", images=HALF)
    run = Run(place.run("resettled"))
    text = run.config_file.read_text()
    edited = text.replace('schedule = "cosine"', 'schedule = "linear"')
    run.config_file.write_text(edited.replace("ema = [0.5, 0.9]", "ema = [0.5, 0.7]"))
    with pytest.raises(
        ValueError, match=r"config: diffusion\.schedule = 'cosine' .*, training\.ema"
    ):
        run.check(configs.load(run.config_file))
    run.config_file.write_text(text.replace("lr = 0.001", "lr = 0.002"))
    assert run.check(configs.load(run.config_file)) == {"training.lr": (0.001, 0.002)}


def test_a_run_that_explodes_stops_and_keeps_its_good_checkpoints(place: Place) -> None:
    """By a learning rate of 1e20; in fp16 the loss scale is constant."""
    runs, sets = {}, (*EVERY, "training.lr = 1e20", "intervals.keep = 1")
    for precision in ("fp32", "bf16", "fp16"):
        place.fork("2x2", name := f"exploded-{precision}", images=HALF)
        own = (*sets, f'training.precision = "{precision}"')
        runs[name] = place.arguments(name, sets=own, loss_scale=128)
    for name, status in zip(runs, place.train(*runs.values(), world=2, fp16=True), strict=True):
        assert f"the run has diverged after image {END}: its last 2 steps" in status
        assert names(place.run(name))[-1] == HALF
        assert equal(place.checkpoint(name, HALF), place.checkpoint("2x2", HALF))


def test_checkpoints_by_time_are_agreed_by_all_ranks_and_change_nothing(
    tmp_path: Path, tiny: Path
) -> None:
    """Every step is late: the ranks know it a step later, and once only."""
    runs = {"timed": ["--set", "intervals.checkpoint_minutes = 1e-6"], "plain": []}
    words = [["train", str(tiny), "--run", str(tmp_path / n), *w] for n, w in runs.items()]
    job = ranks.start(tmp_path / "job", ranks=2, runs=words)
    job.wait()
    assert job.statuses == [0, 0]
    saved = {n: sorted(int(p.name) for p in (tmp_path / n / "checkpoints").iterdir()) for n in runs}
    assert saved == {"timed": [16, 32, 48, 64], "plain": [32, 64]}
    rows = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in runs]
    losses = [[json.loads(row)["loss"] for row in lines] for lines in rows]
    assert losses[0] == losses[1]


def test_only_what_came_too_late_for_a_multiple_is_removed() -> None:
    saved = range(48, 481, 48)
    assert superseded(saved, keep=2, keep_every=None) == [*range(48, 385, 48)]
    kept = set(saved) - set(superseded(saved, keep=2, keep_every=100))
    assert kept == {144, 240, 336, 432, 480}
    # Whatever was removed before, the same ones stay: pruning at every commit is pruning once.
    left: set[int] = set()
    for images in saved:
        left.add(images)
        left -= set(superseded(sorted(left), keep=2, keep_every=100))
    assert left == kept


def test_the_best_checkpoint_is_one_of_those_that_saw_the_newest_validation(tmp_path: Path) -> None:
    for clock, loss, seen in ((1, 0.1, "old"), (2, 0.3, "new"), (3, 0.2, "new"), (4, 0.4, "new")):
        (tmp_path / f"{clock:012d}").mkdir()
        text = json.dumps({"loss": loss, "fingerprint": seen, "count": 5})
        (tmp_path / f"{clock:012d}" / "validation.json").write_text(text)
    assert best(committed(tmp_path)) == tmp_path / f"{3:012d}"


@pytest.fixture
def stuck(place: Place) -> Iterator[Path]:
    """A run with a checkpoint that cannot be removed, and one that somebody left half written."""
    place.fork("2x2", "stuck", images=HALF)
    checkpoints = place.run("stuck") / "checkpoints"
    (checkpoints / f"{HALF:012d}").joinpath("copy").touch()
    held = checkpoints / f"{STEP:012d}" / "model.safetensors"
    half = checkpoints / f".{4 * STEP:012d}.partial" / "model.safetensors"
    half.parent.mkdir()
    half.touch()
    with unremovable(held), unremovable(half):
        yield checkpoints


class unremovable:
    """While entered, a file and so its directory cannot be removed, not even by root."""

    def __init__(self, file: Path) -> None:
        self._directory = os.open(file.parent, os.O_RDONLY)
        self._name = file.name

    def _change(self, attribute: str, mode: int) -> bool:
        here = f"/proc/{os.getpid()}/fd/{self._directory}"
        os.chmod(here, mode)
        if os.getuid():
            return True
        change = ["chattr", attribute, f"{here}/{self._name}"]
        return subprocess.run(change, capture_output=True).returncode == 0

    def __enter__(self) -> None:
        if not os.getuid() and shutil.which("chattr") is None:
            pytest.skip("no chattr: apt-get install -y e2fsprogs")
        if not self._change("+i", 0o500):
            pytest.skip("the file system of the test directory has no immutable files")

    def __exit__(self, *_: object) -> None:
        assert self._change("-i", 0o700)
        os.close(self._directory)


def test_what_cannot_be_removed_is_told_and_removed_later(place: Place, stuck: Path) -> None:
    sets = (*EVERY, "intervals.keep = 1")
    assert place.train(place.arguments("stuck", sets=sets), world=2) == [0]
    assert names(place.run("stuck")) == [END]
    assert place.log("stuck").count("tried again at each checkpoint") == 2  # not at each of them
    assert equal(place.checkpoint("stuck", END), place.checkpoint("2x2", END))
    assert len(list(stuck.glob(".*.removed"))) == 2


def test_the_group_can_read_every_file_of_a_run(place: Place) -> None:
    task = partial(with_an_open_umask, place.root / "open-job", place.arguments("open"))
    job = ranks.fork(place.root / "open-job", task, ranks=2)
    job.wait()
    assert job.statuses == [0]
    modes = {p: p.stat().st_mode & 0o777 for p in place.run("open").rglob("*")}
    assert len([p for p in modes if p.suffix == ".safetensors"]) == 10
    for path, mode in modes.items():
        assert mode == (0o775 if path.is_dir() else 0o664), path


def with_an_open_umask(directory: Path, arguments: list) -> int:
    os.umask(0o002)
    return ranks.work(directory, [arguments], False)


def test_settings_that_deepspeed_refuses_are_one_line(place: Place) -> None:
    arguments = place.arguments("unknown")
    file = place.root / "unknown.json"
    ds_config = json.loads(Path(arguments[arguments.index("--ds-config") + 1]).read_text())
    ds_config["zero_optimization"]["overlap_comm"] = "perhaps"
    file.write_text(json.dumps(ds_config))
    arguments[arguments.index("--ds-config") + 1] = str(file)
    (status,) = place.train(arguments, world=2)
    assert status.startswith("DeepSpeed refuses its settings (--ds-config): ")
    assert "overlap_comm" in status and "\n" not in status
