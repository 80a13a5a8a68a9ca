"""`launch status`: of runs on disk, and live in a real terminal while a job comes and goes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from launch import display, queue, status
from launch.__main__ import main
from launch.signs import Signs
from tests.support.cluster import LIMIT, ROOT, wait_until
from tests.support.site import ENDLESS, Site
from trainer.run.lease import Holder, stop_file
from trainer.run.runstate import RunState, file

STATE_FILES = (
    "launch/state.json",
    "launch/writer.json",
    "launch/job.json",
    "launch/job",
    "launch/events.txt",
    "config.toml",
    "launch/timeline.jsonl",
    "metrics.jsonl",
)
_CONFIG = "[training]\nimages = 1000\n"
_KEYS = (
    *("images", "time", "loss", "skipped", "state", "starts", "began", "run", "host", "pid"),
    *("token", "machine", "job", "start", "launcher", "nodes", "gpus_per_node"),
)
#: The right keys with values of the wrong types.
WRONG = json.dumps({key: [1] for key in _KEYS})


def make_run(path: Path, *, images: int) -> Path:
    """A run directory of the last release: metrics, ten seconds apart, and no state.json."""
    (path / "launch").mkdir(parents=True)
    (path / "config.toml").write_text(_CONFIG)
    now = time.time()
    with (path / "metrics.jsonl").open("w") as metrics:
        for n in (2, 1, 0):
            row = {"images": images - 100 * n, "time": now - 10 * n, "loss": 0.25}
            row |= {"images_per_second": 10.0, "loss_scale": 65536.0, "skipped": 0.0}
            metrics.write(json.dumps(row) + "\n")
    return path


def note(run: Path, **entries: object) -> None:
    """Write the run's state."""
    RunState(**entries).write(run)  # type: ignore[arg-type]


@pytest.mark.parametrize("release", ["last", "this"])
def test_a_finished_run_is_not_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], release: str
) -> None:
    """It could not be trained further by the trainer alone: a file `stop` forbids that."""
    run = make_run(tmp_path / "run", images=1000)
    (run / "checkpoints" / "000000001000").mkdir(parents=True)
    if release == "this":
        note(run, state="finished", images_seen=1000)
    assert main(["stop", str(run)]) == 0
    assert "is finished: there is nothing to stop" in capsys.readouterr().out
    assert not stop_file(run).exists()


def test_ctrl_c_ends_the_wait_for_a_stop_and_not_the_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    make_writer(run)
    words = [sys.executable, "-u", "-m", "launch", "stop", str(run)]
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=PIPE, stderr=STDOUT) as stopping:
        assert stopping.stdout is not None
        assert stopping.stdout.readline().startswith("waiting for the ranks")
        stopping.send_signal(signal.SIGINT)
        said = stopping.communicate()[0]
    assert said == "\nnot waiting any more: the ranks save and stop by themselves\n"
    assert stopping.returncode == 128 + signal.SIGINT and stop_file(run).exists()


def test_a_drawing_job_shows_no_loss_and_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "samples.job" / "launch").mkdir(parents=True)
    note(tmp_path / "samples.job", state="finished")
    shown = text(tmp_path / "samples.job").splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["job", "health"]


def test_a_directory_of_runs_is_told_from_none(tmp_path: Path) -> None:
    make_run(tmp_path / "run", images=1000)
    with pytest.raises(ValueError, match=r"is not a run directory; it holds 1: give .*/\*"):
        status.read(tmp_path)


def slurm(queued: dict[str, str], *, ended: dict[str, str], calls: list | None = None) -> Callable:
    """A stand-in for Slurm's commands: the states of jobs in the queue, and of ended ones."""

    def run(*command: str, env: object = None) -> str:
        if calls is not None:
            calls.append(command)
        asked = command[command.index("-j") + 1].split(",")
        if command[0] == "squeue":
            return "".join(f"{j}|{queued[j]}\n" for j in asked if j in queued)
        return "".join(f"{j}|{ended[j]}\n" for j in asked if j in ended)

    return run


def add_events(run: Path, *events: str) -> None:
    """Write what the batch script recorded."""
    lines = (f"2026-11-25 02:10:32  {event}\n" for event in events)
    (run / "launch" / "events.txt").write_text("".join(lines))


def make_writer(run: Path) -> None:
    """A live process, this one, that holds the lease."""
    holder = Holder.here(run)
    (run / "launch" / "writer.json").write_text(json.dumps(vars(holder)))


def text(*runs: Path) -> str:
    """What `launch status` prints of them."""
    return display.text(display.look(runs, signs=Signs()))


def test_a_run_on_disk(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    (run / "checkpoints" / "000000000400").mkdir(parents=True)
    note(run, state="running", images_seen=500, starts=3, checkpoint="000000000400")
    shown = text(run)
    for fact in ("500 of 1,000 (50.0 %)", "0.2500", "loss scale 65536", "no job", "2 restarts"):
        assert fact in shown
    assert re.search(r"000000000400, \d+ s ago", shown)
    assert status.read(run).health == "not running; the last start did not record how it ended"


def test_a_run_of_the_last_release_shows_what_its_directory_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=1000)
    start = "2026-11-25 02:10:32  goes on from checkpoint 000000000008: denoise\n"
    (run / "log.txt").write_text(14 * start)
    shown = status.read(run)
    assert (shown.health, shown.restarts, shown.images_seen) == ("not running", None, 1000)
    assert "restarts" not in display.render(shown)
    (run / "checkpoints" / "000000001000").mkdir(parents=True)
    assert (status.read(run).left, status.read(run).health) == ("finished", "finished")
    (run / "metrics.jsonl").unlink()
    assert status.read(run).images_seen == 1000


@pytest.mark.parametrize(
    ("entries", "health"),
    [
        ({"state": "finished"}, "finished"),
        ({"state": "stopped", "why": "by `python -m launch stop`"}, "stopped by `python -m launch"),
        ({"state": "stopped", "why": "by a signal"}, "stopped by a signal"),
        ({"state": "refused", "why": "no shards\nat all"}, "refused: no shards"),
        ({"state": "failed", "why": "lost: n2 (rank 2)"}, "failed: lost: n2 (rank 2)"),
    ],
)
def test_the_state_says_how_the_last_start_ended(
    entries: dict[str, object], health: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, **entries)
    assert status.read(run).health.startswith(health)
    assert status.read(run).is_finished == (health == "finished")
    assert "\n" not in status.read(run).health


def test_the_last_event_of_the_batch_script_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="failed", why="RuntimeError: no space left")
    add_events(run, "job 7 start 0: begins on n1", "job 7 start 1: failed with status 1")
    lines = text(run).splitlines()
    assert lines[-2:] == [
        "  health  failed: RuntimeError: no space left",
        "  event   job 7 start 1: failed with status 1",
    ]


def test_a_live_run_without_metrics_for_long_is_not_healthy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1)
    make_writer(run)
    assert (status.read(run).is_running, status.read(run).health) == (True, "ok")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    late = [json.dumps({**row, "time": row["time"] - 7200}) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(late))
    note(run, state="running", images_seen=500, starts=2, began=time.time())
    assert re.fullmatch(r"starting for \d+ s: no metrics yet", status.read(run).health)
    note(run, state="running", images_seen=500, starts=2, began=time.time() - 3630)
    assert status.read(run).health.startswith("no metrics since it started 1 h 0 min ago")
    note(run, state="running", images_seen=500, starts=1)
    os.utime(file(run), (time.time() - 3630, time.time() - 3630))
    assert status.read(run).health == "no metrics for 1 h 0 min (usually every 10 s)"


@pytest.mark.parametrize(
    ("last", "health"),
    [
        ({"loss": 0.25, "skipped": 0.5}, "ok"),
        ({"loss": 0.25, "skipped": 1.0}, "every step .* skipped: gradients overflow"),  # fp16
        ({"loss": None, "skipped": 1.0}, "diverged: the loss is not finite"),
        ({"loss": None, "skipped": 0.0}, "diverged: the loss is not finite"),
        ({"skipped": 1.0}, "every step .* skipped: log.txt says why"),  # refused: it has no loss
    ],
)
def test_a_live_run_that_does_not_learn_is_not_healthy(
    tmp_path: Path, last: dict, health: str
) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1)
    make_writer(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"images": 600, "time": time.time(), **last}) + "\n")
    assert re.fullmatch(health, status.read(run).health)


def test_a_run_is_alive_by_its_lease_where_slurm_does_not_respond_or_show_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_writer(run := make_run(tmp_path / "run", images=500))
    (run / "launch" / "job").write_text("7\n")
    monkeypatch.setenv("PATH", "")
    assert status.read(run).job.startswith("job 7: unknown (there is no squeue")
    assert status.read(run).is_running
    monkeypatch.setattr(queue, "_slurm", slurm({}, ended={"7": "CANCELLED by 0"}))
    assert (gone := status.read(run)).job == "job 7: gone (CANCELLED by 0)" and not gone.is_running
    monkeypatch.setattr(queue, "_slurm", slurm({}, ended={}))
    assert "running; this Slurm shows" in (hidden := status.read(run)).job and hidden.is_running


@pytest.mark.parametrize("torn", ["", "{", '{"state": 5}', "[]", "null", "\0\0", "x = ", WRONG])
@pytest.mark.parametrize("name", STATE_FILES)
def test_an_empty_or_torn_file_gives_no_traceback(
    name: str, torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1)
    (run / name).write_text(torn)
    assert "images  500" in text(run)


def test_several_runs_fit_80_columns(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / (name * 60), images=300) for name in "ab"]
    lines = text(*runs).splitlines()
    assert len(lines) == 13 and max(map(len, lines)) < 80
    assert all(any(name * 50 in line for line in lines) for name in "ab")


def test_a_line_that_is_being_written_or_was_torn_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"images": 6')
        metrics.flush()
        assert status.read(run).images_seen == 500
        metrics.write('{"images": 700}\n{"images": 800, "time": 1.0}\n')  # by another start
    assert status.read(run).images_seen == 800


@pytest.mark.timeout(4 * LIMIT)
def test_watched_in_a_terminal_while_the_job_comes_and_goes(site: Site) -> None:
    name, run = "watched", site.run("watched")
    job = site.submit(name, site.settings("slurm"), ENDLESS, nodes=1)
    terminal = ("tmux", "-L", "tests", "-f", "/dev/null")
    watch = shlex.join(map(str, site.words("status", run, "--watch")))
    site.cluster.run("ctl", *terminal, "new-session", "-d", "-x", "80", "-y", "24", watch)

    def shown_with(words: str) -> str:
        """The screen once it shows these words, and is whole: the last event is its last line."""
        found: list[str] = []

        def is_shown() -> bool:
            found[:] = [site.cluster.run("ctl", *terminal, "capture-pane", "-p")]
            return words in found[0] and site.events(name).strip()[-20:] in found[0]

        wait_until(is_shown, f"{words!r} on the screen")
        return found[0]

    try:
        site.wait_start(name, 0)
        shown = shown_with("images/s")
        assert f"job {job}, 1 x 2: RUNNING" in shown and "health  ok" in shown
        assert "of 80,000,000" in shown and " left" in shown
        assert len(re.findall("^  ", shown, re.M)) == len(shown.strip().splitlines()) - 2 >= 7
        site.cluster.run("ctl", *site.words("stop", run))
        shown = shown_with("gone (")
        assert "stopped as requested" in shown and "images/s" not in shown
        assert f"{site.rows(name)[-1]['images']:,} of 80,000,000" in shown
        assert f"{site.rows(name)[-1]['images']:012d}" in shown
    finally:
        site.cluster.run("ctl", *terminal, "kill-server", check=False)
