"""Where the time of a run went, from its timeline alone; and ranks that hold the others up."""

import json
import time
from pathlib import Path

import pytest

from launch import status
from tests.test_launch_status import make_run, make_writer
from trainer.run import goodput
from trainer.watch.pace import SlowRanks


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


def test_the_time_left_counts_what_recurs_beside_training(tmp_path: Path) -> None:
    """Of 200 seconds 50 went on training and waiting, 90 on saves and a grid, 60 on compiling."""
    run, now = make_run(tmp_path / "run", images=500), time.time()
    make_writer(run)
    rows = [
        start(now - 300),
        training(now - 200, 0),
        report(now - 100, 1000, compiling=60.0, waiting=10.0, saving=20.0),
        report(now, 2000, saving=25.0, drawing=45.0),
    ]
    goodput.file(run).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = status.read(run)
    assert found.total is not None and found.rate == 10.0
    left = (found.total - 500) / 10.0 * (50 + 90) / 50
    assert found.seconds_left == pytest.approx(left, rel=0.1)


def test_shares_are_told_from_the_training_on_down_without_the_smallest() -> None:
    found = goodput.account([*KILLED[:-1], report(800, 3000, drawing=3.0), end(830, "finished")])
    assert found is not None and sum(found.shares.values()) == pytest.approx(1)
    assert str(found) == (
        "productive 32 %, starting 24 %, queued 19 %, lost 17 %, saving 6 %, waiting for data 1 %"
    )


def test_a_checkpoint_between_two_reports_splits_the_interval() -> None:
    resumed = [*KILLED[:5], start(600, last_sign=500.0), training(700, 2500)]
    assert seconds(resumed)["lost"] == 50
    older = [*KILLED, start(900), training(1000, 1000)]  # the checkpoint at 2000 was damaged
    assert seconds(older)["lost"] == 100 + 100 + 40 + 100


def test_a_run_that_still_trains_is_counted_until_now() -> None:
    assert seconds(KILLED, now=900.0)["productive"] == 90 + 80 + 95 + 100
    found = goodput.account(KILLED, now=900.0)
    assert found is not None and found.failures == 1
    for rows, live, dead in ((KILLED, 1, 2), ([*KILLED, start(900)], 2, 3)):
        counted = [goodput.account(rows, now=950.0), goodput.account(rows)]
        assert [each.failures for each in counted if each] == [live, dead]


def test_a_start_that_has_not_trained_is_starting_until_it_ends() -> None:
    assert seconds([start(100, submitted=0.0), end(130, "failed")]) == {
        "queued": 100,
        "starting": 30,
    }
    assert goodput.starting(KILLED[:6], now=650.0) == 50  # whatever the start before it reported
    assert goodput.starting(KILLED, now=900.0) is None


@pytest.mark.parametrize("by", [-150.0, 5000.0])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_clock_that_is_set_in_a_start_is_no_time_of_the_run(after: int, by: float) -> None:
    """Of row `after`, in the middle of the first start, and all later ones."""
    rows: list[dict] = [{**row, "uptime": row["time"] + 1e6} for row in KILLED]
    for row in rows[after + 1 :]:
        row.update({name: row[name] + by for name in ("time", "began", "last_sign") if name in row})
    assert seconds(rows, now=900.0 + by) == seconds(KILLED, now=900.0)
    rows = rows[: after + 2]
    assert seconds(rows, now=450.0 + by) == seconds(KILLED[: after + 2], now=450.0)


@pytest.mark.parametrize(("first", "second"), [(600, 600), (-90, 86400), (86400, -590)])
def test_machines_with_other_clocks_than_the_file_server_change_nothing(
    first: float, second: float
) -> None:
    """By so many seconds each start's machine is ahead of the server."""
    rows: list[dict] = [{**row, "uptime": row["time"] + 1e6} for row in KILLED]
    rows[0] |= {"claimed": 101.0, "written": None}
    rows[5] |= {"claimed": 601.0, "written": 500.0}
    for number, row in enumerate(rows):
        by = first if number < 5 else second
        row.update({name: row[name] + by for name in ("time", "began") if name in row})
    assert seconds(rows, now=900.0 + second) == seconds(KILLED, now=900.0)
    assert seconds(rows) == seconds(KILLED)


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
    found = goodput.account([start(0), *KILLED[1:4]], now=450.0)
    assert found is not None and found.between_failures == 450
    assert "no failure in 7 min" in found.advice() and "(1,342 images)" in found.advice()


@pytest.mark.parametrize(
    "torn", ["", '{"event": "re', "null", '{"event": "report", "time": 1}', "\0"]
)
def test_torn_lines_are_left_out(torn: str, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    goodput.append(tmp_path, goodput.row("training", images=5))
    with goodput.file(tmp_path).open("a") as file:
        file.write(torn)
    goodput.append(tmp_path, goodput.row("end", state="finished"))
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
