"""`launch status` of many runs, of runs on machines with other clocks, and of diverged ones."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from launch import display, queue, status
from launch.__main__ import main
from launch.signs import Signs
from tests.test_launch_status import make_run, make_writer, note, slurm, text
from trainer.run.lease import Holder


def test_one_bad_entry_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell's `runs/*` names files, and directories that are no runs, too."""
    good = make_run(tmp_path / "good", images=500)
    (tmp_path / "sweep.sh").write_text("")
    (tmp_path / "empty").mkdir()
    entries = [str(tmp_path / name) for name in ("sweep.sh", "gone", "good", "empty")]
    assert main(["status", *entries]) == 78
    shown = capsys.readouterr()
    assert "500 of 1,000" in shown.out and shown.err.count("is not a run directory; ") == 3
    assert main(["status", "--json", *entries]) == 78
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == entries
    assert [row.get("images_seen") for row in rows] == [None, None, 500, None]
    assert main(["status", "--json", str(good)]) == 0


def test_a_long_reason_is_shown_to_its_end_in_80_columns(tmp_path: Path) -> None:
    why = "no checkpoint of the run is valid; to start from the beginning, move runs/x/checkpoints"
    note(run := make_run(tmp_path / "r", images=300), state="refused", why=f"{why} away")
    lines = text(run).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  health"))
    assert lines[at + 1].startswith(" " * 10) and max(map(len, lines)) < 80
    assert " ".join(" ".join(lines[at : at + 2]).split()) == f"health refused: {why} away"


def test_many_runs_ask_slurm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / str(n), images=500) for n in range(5)]
    for n, run in enumerate(runs):
        (run / "launch" / "job").write_text(f"{n}\n")
    (runs[4] / "launch" / "job").write_text("not a job\n")  # squeue would refuse all for it
    calls: list = []
    queued = {"0": "RUNNING|None", "1": "PENDING|Resources", "2": "COMPLETED|None"}
    found = slurm(queued, ended={"3": "TIMEOUT"}, calls=calls)
    monkeypatch.setattr(queue, "_slurm", found)
    signs = Signs()
    for _ in range(3):
        jobs = [each.job for each in display.look(runs, signs=signs).values()]  # type: ignore[union-attr]
    assert jobs == [
        "job 0: RUNNING", "job 1: PENDING (Resources)", "job 2: gone (COMPLETED)",
        "job 3: gone (TIMEOUT)", "no job",
    ]  # fmt: skip
    assert [call[0] for call in calls] == ["squeue", "sacct"]


@pytest.mark.parametrize("shown", ["null", "NaN"])
def test_a_diverged_loss_is_not_a_missing_one(shown: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1, began=time.time() - 100)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 0.25', f'"loss": {shown}'))
    make_writer(run)
    assert "loss    not finite" in text(run)
    assert "health  diverged: the loss is not finite" in text(run)
    assert json.loads(display.as_json({run: status.read(run)}))[0]["loss"] is None


@pytest.mark.parametrize("minutes", [3, -3])
def test_clocks_that_differ_change_nothing(minutes: int, tmp_path: Path) -> None:
    """The files' clock is minutes before or behind this machine's; the writer's pid is not here."""
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1, began=0.0)
    elsewhere = {**vars(Holder.here(run)), "machine": "another", "host": "gpu7"}
    writer = run / "launch" / "writer.json"
    writer.write_text(json.dumps(elsewhere))

    def touch() -> None:
        os.utime(writer, (time.time() + 60 * minutes, time.time() + 60 * minutes))

    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    late = [json.dumps({**row, "time": row["time"] + 60 * minutes}) + "\n" for row in rows]
    metrics.write_text("".join(late))
    touch()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            touch()

    beats = threading.Thread(target=beat)
    beats.start()
    found = status.read(run)
    done.set()
    beats.join()
    assert (found.is_running, found.health) == (True, "ok")
    assert found.age is not None and abs(found.age) < 30


def on_another_clock(path: Path, *, minutes: int, set_by: float = 0.0, ago: float = 0.0) -> Path:
    """A live run on a machine whose clock is minutes ahead of this one, which is the files'.

    It has reported so many seconds `ago`, and began an hour before; after that its clock was set,
    by so many seconds, to what it is now.
    """
    run, now = make_run(path, images=500), time.time() + 60 * minutes - ago
    began = now - 3600 - set_by
    note(run, state="running", images_seen=500, starts=1, began=began)
    make_writer(run)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    late = [json.dumps({**row, "time": row["time"] + 60 * minutes - ago}) + "\n" for row in rows]
    metrics.write_text("".join(late))
    timeline = [
        {
            "event": "start",
            "time": began,
            "began": began,
            "uptime": 0,
            "claimed": began + set_by - 60 * minutes,
        },
        {"event": "training", "time": began + 60, "uptime": 60, "images": 0},
        {"event": "report", "time": now, "uptime": 3600, "images": 500},
    ]
    text = "".join(json.dumps(row) + "\n" for row in timeline)
    (run / "launch" / "timeline.jsonl").write_text(text)
    for name in ("metrics.jsonl", "launch/timeline.jsonl", "launch/state.json"):
        os.utime(run / name, (time.time() - ago,) * 2)
    return run


@pytest.mark.parametrize("minutes", [0, 10, -10, 1440, -1440])
@pytest.mark.parametrize("set_by", [0.0, 7200.0, -7200.0])
def test_a_machine_with_another_clock_than_the_file_server_is_shown_as_it_is(
    set_by: float, minutes: int, tmp_path: Path
) -> None:
    run = on_another_clock(tmp_path / "run", minutes=minutes, set_by=set_by)
    found = status.read(run)
    assert (found.is_running, found.health) == (True, "ok")
    assert found.age is not None and abs(found.age) < 30
    assert found.goodput is not None
    assert found.goodput.seconds["starting"] == pytest.approx(60)
    assert found.goodput.seconds["productive"] == pytest.approx(3540, abs=30)


@pytest.mark.parametrize("minutes", [0, 10, -10, 1440, -1440])
def test_a_run_that_hangs_on_a_machine_with_another_clock_is_not_ok(
    minutes: int, tmp_path: Path
) -> None:
    run = on_another_clock(tmp_path / "run", minutes=minutes, ago=900)
    found = status.read(run)
    assert re.fullmatch(r"no metrics for 15 min \d+ s \(usually every 10 s\)", found.health)
    assert found.age is not None and abs(found.age - 900) < 30


@pytest.mark.parametrize("minutes", [0, 10, -10, 1440, -1440])
def test_a_dead_run_s_last_loss_is_as_old_as_it_is(minutes: int, tmp_path: Path) -> None:
    """Also where it was copied since, and its files are newer."""
    run = on_another_clock(tmp_path / "run", minutes=minutes, ago=900)
    (run / "launch" / "writer.json").unlink()
    copied = Path(shutil.copytree(run, tmp_path / "copied", copy_function=shutil.copyfile))
    ages = [status.read(each).age for each in (run, copied)]
    assert ages == pytest.approx([900, 900], abs=30)


@pytest.mark.parametrize("minutes", [0, 10, -10, 1440, -1440])
def test_a_start_on_a_machine_with_another_clock_is_a_start(minutes: int, tmp_path: Path) -> None:
    """Whatever the rows of the last start, which another machine wrote, say of the time."""
    run = on_another_clock(tmp_path / "run", minutes=minutes)
    now = time.time() - 60 * minutes
    note(run, state="running", images_seen=500, starts=2, began=now)
    row = {"event": "start", "time": now, "began": now - 30, "uptime": 100}
    with (run / "launch" / "timeline.jsonl").open("a") as timeline:
        timeline.write(json.dumps(row) + "\n")
    assert re.fullmatch(r"starting for \d+ s: no metrics yet", status.read(run).health)


@pytest.mark.parametrize("minutes", [0, 10, -10])
def test_a_stop_says_how_old_the_checkpoint_is_by_the_clock_of_the_files(
    minutes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By this machine's, what was saved just now might seem to be of before the stop."""
    run, now = make_run(tmp_path / "run", images=500), time.time
    (run / "checkpoints" / "000000000500").mkdir(parents=True)
    os.utime(run / "checkpoints" / "000000000500", (now() - 75,) * 2)
    monkeypatch.setattr(time, "time", lambda: now() + 60 * minutes)
    assert main(["stop", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"last checkpoint: 000000000500, 1 min 1[5-9] s ago", said), said


def test_a_machine_that_dies_while_it_is_watched_is_not_shown_as_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.signs._WAIT", 1.0)
    run = make_run(tmp_path / "run", images=500)
    elsewhere = {**vars(Holder.here(run)), "machine": "another", "host": "gpu7"}
    (run / "launch" / "writer.json").write_text(json.dumps(elsewhere))
    signs = Signs()
    signs.look([run])
    assert signs.is_alive(run)
    time.sleep(1.0)
    signs.look([run])
    assert not signs.is_alive(run)


def test_where_the_time_went_is_shown_and_in_the_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    (run / "launch" / "timeline.jsonl").write_text(
        '{"event": "start", "time": 0, "began": 0}\n'
        '{"event": "training", "time": 10, "images": 0}\n'
        '{"event": "report", "time": 90, "images": 500, "saving": 8.0, "saves": 1}\n'
    )
    assert "  time    productive 80 %, starting 11 %, saving 9 %\n" in text(run)
    (row,) = json.loads(display.as_json({run: status.read(run)}))
    assert row["goodput"]["seconds"]["saving"] == 8.0
    assert row["advised_checkpoint_seconds"] == (2 * 8 * 90) ** 0.5


def test_a_job_that_runs_but_has_not_claimed_its_run_is_not_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job").write_text("7\n")
    monkeypatch.setattr(queue, "_slurm", slurm({"7": "RUNNING|None"}, ended={}))
    assert status.read(tmp_path).health == "starting: the run is not claimed yet"
    note(tmp_path, state="stopped", why="by a signal", starts=1)  # the last start's
    assert status.read(tmp_path).health == "starting: the run is not claimed yet"


def test_a_row_of_a_validation_hides_neither_the_loss_nor_the_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1, began=time.time() - 100)
    with (run / "metrics.jsonl").open("a") as metrics:
        row = {"images": 500, "time": time.time(), "validation/loss": 0.3}
        metrics.write(json.dumps(row) + "\n")
    make_writer(run)
    assert "0.2500, loss scale 65536" in text(run) and "10.0 images/s" in text(run)
    assert status.read(run).health == "ok"


def test_a_suspended_job_has_not_ended_and_stop_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", images=500)
    note(run, state="running", images_seen=500, starts=1, began=time.time() - 100)
    (run / "launch" / "job").write_text("7\n")
    monkeypatch.setattr(queue, "_slurm", slurm({"7": "SUSPENDED|None"}, ended={}))
    assert "health  suspended: no rank runs until Slurm resumes the job" in text(run)
    states = ["", "SUSPENDED|None"]
    monkeypatch.setattr(queue, "_slurm", lambda *_, **__: states.pop())
    assert main(["stop", str(run)]) == 0
    assert (
        "job 7 is suspended: it saves when Slurm resumes it; `scancel 7`" in capsys.readouterr().out
    )


@pytest.mark.parametrize("then", ["PENDING|BeginTime", "SPECIAL_EXIT|job requeued in held state"])
def test_a_job_that_is_requeued_while_it_is_stopped_leaves_the_queue(
    then: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", images=500)
    (run / "launch" / "job").write_text("7\n")
    states = [then, "COMPLETING|None"]

    def answer(*command: str, env: object = None) -> str:
        if command[0] == "scancel":
            states.clear()
        return states.pop() if len(states) > 1 else "".join(states)

    monkeypatch.setattr(queue, "_slurm", answer)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert main(["stop", str(run)]) == 0
    assert "removed from the queue" in capsys.readouterr().out and not states
