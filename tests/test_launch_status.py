"""`launch status`: of runs on disk, and live in a real terminal while a job comes and goes."""

import json
import re
import time
from pathlib import Path

import pytest

from launch import status
from tests.cluster import wait_until
from tests.site import Site

_CONFIG = "[training]\nimages = 1000\n"


def make_run(path: Path, *, images: int) -> Path:
    """A run directory with three lines of metrics, ten seconds apart."""
    (path / "launch").mkdir(parents=True)
    (path / "config.toml").write_text(_CONFIG)
    now = time.time()
    with (path / "metrics.jsonl").open("w") as file:
        for n in (2, 1, 0):
            row = {"images": images - 100 * n, "time": now - 10 * n, "loss": 0.25,
                   "images_per_second": 10.0, "loss_scale": 65536.0, "skipped": 0.0}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


def test_a_run_on_disk(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    (run / "checkpoints" / "000000000400").mkdir(parents=True)
    text = status.text([run])
    for fact in ("500 of 1,000 (50.0 %)", "0.2500", "loss scale 65536", "no job"):
        assert fact in text
    assert re.search(r"000000000400, \d+ s ago", text)
    assert status.read(run).health == "nobody trains it"


def test_a_run_is_finished_when_its_last_checkpoint_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=1000)
    events = "2026-11-25 02:10:32  job 7 start 1: failed with status 1, for the second time\n"
    (run / "launch" / "events.txt").write_text(events)
    assert not status.read(run).is_finished
    assert status.read(run).health == events.strip().partition("  ")[2]
    (run / "checkpoints" / "000000001000").mkdir(parents=True)
    assert (status.read(run).left, status.read(run).health) == ("finished", "finished")


def test_all_restarts_of_a_long_log_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    start = "2026-11-25 02:10:32  resumes from checkpoint 000000000008: denoise\n"
    (run / "log.txt").write_text(14 * (start + 500 * "2026-11-25 02:10:32  images 8 of 64\n"))
    assert status.read(run).restarts == 14


def test_several_runs_fit_80_columns(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / (name * 60), images=300) for name in "ab"]
    lines = status.text(runs).splitlines()
    assert len(lines) == 13 and max(map(len, lines)) < 80
    assert all(any(name * 50 in line for line in lines) for name in "ab")


def test_a_line_that_is_being_written_or_was_torn_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 6')
        file.flush()
        assert status.read(run).images == 500
        file.write('{"images": 700}\n{"images": 800, "time": 1.0}\n')  # another start went on
    assert status.read(run).images == 800


@pytest.mark.timeout(900)
def test_watched_in_a_terminal_while_the_job_comes_and_goes(site: Site) -> None:
    name, run = "watched", site.run("watched")
    job = site.submit(name, site.settings("slurm"), "training.images = 800000", nodes=1)
    terminal = ("tmux", "-L", "tests", "-f", "/dev/null")
    watch = " ".join(map(str, site.words("status", run, "--watch")))
    site.cluster.run("ctl", *terminal, "new-session", "-d", "-x", "80", "-y", "24", watch)

    def screen() -> str:
        return site.cluster.run("ctl", *terminal, "capture-pane", "-p")

    try:
        site.wait_start(name, 0)
        wait_until(lambda: "images/s" in screen(), "the rate on the screen")
        shown = screen()
        assert f"job {job}, 1 x 2: RUNNING" in shown and "health  ok" in shown
        assert "of 800,000" in shown and " left" in shown
        assert len(shown.strip().splitlines()) == 7  # no line was wrapped
        site.cluster.run("ctl", *site.words("stop", run))
        wait_until(lambda: "gone (" in screen(), "the end on the screen")
        shown = screen()
        assert "stopped as asked" in shown and "images/s" not in shown
        assert f"{site.rows(name)[-1]['images']:,} of 800,000" in shown
        assert f"{site.rows(name)[-1]['images']:012d}" in shown
    finally:
        site.cluster.run("ctl", *terminal, "kill-server", check=False)
