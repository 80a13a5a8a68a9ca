"""What a run shows: rows of metrics, each clock once, whatever an earlier start left."""

import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.faults import full_disk
from trainer.config import experiment as configs
from trainer.run import goodput
from trainer.run.directory import Run
from trainer.run.records import Records
from trainer.watch import wandb
from trainer.watch.board import Board
from trainer.watch.mfu import Mfu

VALUES = {"images_per_second": 64.0, "interval_seconds": 1.0, "skipped_total": 0.0}


def open_board(
    run: Path,
    *,
    images_seen: int,
    sets: tuple[str, ...] = (),
    log: Callable[[str], None] = lambda _: None,
) -> Board:
    (run / "launch").mkdir(exist_ok=True)
    mfu = Mfu(flops_per_image=1e9, measured=1e12, datasheet=2e12)
    config = configs.load("digits", sets)

    class Unclaimed(Run):
        def check_lease(self) -> None:
            pass

        def log(self, text: str) -> None:
            log(text)

    unclaimed = Unclaimed(run, _records=Records(run, check=lambda: None, show=log))
    return Board(unclaimed, config=config, images_seen=images_seen, mfu=mfu)


def report(board: Board, loss: float, *, images_seen: int, **more: float) -> None:
    board.report({"loss": loss, **VALUES, **more}, images_seen=images_seen, slow="")
    board._run.settle()


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_rows_beyond_the_checkpoint_and_a_torn_row_are_not_kept(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        for images_seen in (64, 128, 192):
            report(board, 1.0, images_seen=images_seen)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images": 256, "lo\xff')  # killed here, and resumed at 128
    with open_board(tmp_path, images_seen=128) as board:
        report(board, 2.0, images_seen=192)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["images"], row["loss"]) for row in rows] == [(64, 1.0), (128, 1.0), (192, 2.0)]


def test_a_resumed_run_of_the_last_release_has_whole_curves_under_the_new_tags(
    tmp_path: Path,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    old = SummaryWriter(str(tmp_path / "tensorboard"))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for images in (64, 128, 192):
            row = {"images": images, "time": 1e9 + images, "loss": 1.0, "lr": 0.1, "mse": None}
            file.write(json.dumps({**row, "images_per_second": 8.0}) + "\n")
            old.add_scalar("train/loss", 1.0, images)
            old.add_scalar("train/lr", 0.1, images)
    old.close()
    for _ in range(2):  # resumed at 128, and once more
        with open_board(tmp_path, images_seen=128) as board:
            report(board, 2.0, images_seen=192, lr=0.2)
    found = events(tmp_path)
    for tag, last in (("train/loss", 2.0), ("optimizer/lr", 0.2), ("0_overview/loss", 2.0)):
        points = [(event.step, round(event.value, 3)) for event in found.Scalars(tag)]
        assert [step for step, _ in points] == [64, 128, 192], tag
        assert points[-1] == (192, last)
    assert found.Scalars("optimizer/lr")[0].wall_time == 1e9 + 64


def test_tensorboard_answers_at_a_glance(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        quarters = {f"loss/q{q}": 1.0 for q in range(4)}
        report(board, 0.5, images_seen=64, data_wait_share=0.25, odd=1.0, **quarters)
    found = events(tmp_path)
    tags = found.Tags()["scalars"]
    first = {tag.split("/")[1] for tag in tags if tag.startswith("0_overview/")}
    assert first == {
        *("loss", "share_done", "hours_left", "images_per_second", "mfu", "skipped_steps"),
        "data_wait_share",
    }
    assert all("/" in tag for tag in tags) and "train/odd" in tags
    (mfu,) = found.Scalars("speed/mfu_datasheet")
    assert round(mfu.value, 3) == round(64 * 1e9 / 2e12, 3)
    (text,) = found.Tensors("0_overview/status/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    for fact in ("64 of", "time left", "25.0 % of the time", "slow ranks | none", "3.2 % of the"):
        assert fact in shown
    (layout,) = found.Tensors("custom_scalars__config__")
    assert rb"^loss/q\d$" in layout.tensor_proto.string_val[0]


def test_an_event_file_torn_by_a_crash_hides_nothing_of_later_starts(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        report(board, 1.0, images_seen=64)
        report(board, 1.0, images_seen=128)
    (torn,) = (tmp_path / "tensorboard").glob("events*")
    torn.write_bytes(torn.read_bytes()[:-40] + bytes(20))  # as NFS shows blocks that are not there
    with open_board(tmp_path, images_seen=128) as board:
        report(board, 2.0, images_seen=192)
    steps = [event.step for event in events(tmp_path).Scalars("train/loss")]
    assert steps[0] == 64 and steps[-1] == 192


def test_what_a_full_disk_did_not_take_is_shown_when_there_is_room(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        report(board, 1.0, images_seen=64)
        threads = threading.enumerate()
        for images_seen in (128, 192):
            with full_disk():
                report(board, 1.0, images_seen=images_seen)
                picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
                board.picture("samples", picture, images_seen=images_seen)
                board._run.settle()
        assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [64]
        report(board, 1.0, images_seen=256)
        assert set(threading.enumerate()) <= set(threads)  # one could end with a traceback
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == [64, 128, 192, 256]
    assert [image.step for image in found.Images("samples")] == [128, 192]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_curves_go_on_where_their_directory_was_removed(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        report(board, 1.0, images_seen=64)
        shutil.rmtree(tmp_path / "tensorboard")
        report(board, 1.0, images_seen=128)
    with open_board(tmp_path, images_seen=128) as board:
        report(board, 1.0, images_seen=192)
    for tag in ("train/loss", "0_overview/loss"):
        assert [event.step for event in events(tmp_path).Scalars(tag)] == [128, 192]


def test_a_start_whose_clock_is_behind_hides_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Event files are read by the number in their names, and each start removes what it redoes."""
    said: list[str] = []
    now = time.time()
    for hours, begin in ((0, 0), (-2, 128), (-1, 192)):
        monkeypatch.setattr("time.time", lambda hours=hours: now + 3600 * hours)
        with open_board(tmp_path, images_seen=begin, log=said.append) as board:
            for images_seen in range(begin + 64, begin + 193, 64):
                report(board, float(begin), images_seen=images_seen)
    points = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert points == [(64, 0), (128, 0), (192, 128), (256, 192), (320, 192), (384, 192)]
    behind = [line for line in said if "TensorBoard: the clock is" in line]
    assert len(behind) == 2 and "2 h" in behind[0]


def test_hours_left_and_rates_are_those_of_this_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of all images over the seconds since the resume would be far too high."""
    now = [1000.0]
    monkeypatch.setattr("trainer.watch.board.time.monotonic", lambda: now[0])
    with open_board(tmp_path, images_seen=12_800) as board:  # half of the run
        now[0] += 3600.0
        report(board, 1.0, images_seen=19_200)
    (hours,) = events(tmp_path).Scalars("0_overview/hours_left")
    assert hours.value == pytest.approx(1.0, rel=1e-3)


def test_values_that_are_not_finite_are_seen_everywhere(tmp_path: Path) -> None:
    with open_board(tmp_path, images_seen=0) as board:
        report(board, math.nan, images_seen=64)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert row["loss"] is None
    found = events(tmp_path)
    assert math.isnan(found.Scalars("0_overview/loss")[0].value)
    (text,) = found.Tensors("0_overview/status/text_summary")
    assert b"| loss | nan |" in text.tensor_proto.string_val[0]


def test_weights_and_biases_shows_the_same_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("wandb")  # no dependency of this project
    monkeypatch.setenv("WANDB_MODE", "offline")
    for images_seen in (0, 64):
        sets = ('board.wandb = "adm"',)
        with open_board(tmp_path, images_seen=images_seen, sets=sets) as board:
            report(board, 0.5, images_seen=images_seen + 64)
            picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
            board.picture("samples", picture, images_seen=images_seen + 64)
    library.teardown()  # at the end of the process it writes what it still holds
    (run_id,) = {file.stem for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert run_id == f"run-{(tmp_path / 'wandb' / 'id').read_text()}"
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        assert b"0_overview/loss" in file.read_bytes()
        assert list(file.parent.glob("files/media/images/samples*.png"))
    assert len(events(tmp_path).Scalars("train/loss")) == 2
    said: list[str] = []
    copy = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy"))
    wandb.WandB(copy, project="adm", config="", log=said.append).close()
    library.teardown()
    own = (copy / "wandb" / "id").read_text()
    assert own not in run_id and list(copy.glob(f"wandb/offline-run-*/run-{own}.wandb"))
    assert said == [f"wandb: {copy} is a copy of {tmp_path}, and is shown as a run of its own"]
    said.clear()
    broken = wandb.WandB(tmp_path, project="adm", config="", log=said.append)
    library.teardown()  # its service is killed
    broken.scalars({"loss": 1.0}, images_seen=256)
    broken.scalars({"loss": 1.0}, images_seen=320)
    broken.close()
    assert len(said) == 1  # and the run goes on


def test_a_run_that_weights_and_biases_has_shown_resumes_where_it_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("wandb")  # no dependency of this project

    def fail(**_: object) -> None:
        raise library.errors.CommError("context deadline\nexceeded")

    said: list[str] = []
    with monkeypatch.context() as down:
        down.setattr(library, "init", fail)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^board.wandb = 'adm': context deadline exceede"):
                wandb.WandB(tmp_path, project="adm", config="", log=said.append)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.WandB(tmp_path, project="adm", config="", log=said.append).close()
    monkeypatch.setattr(library, "init", fail)
    board = wandb.WandB(tmp_path, project="adm", config="", log=said.append)
    board.scalars({"loss": 1.0}, images_seen=64)
    board.picture("samples", torch.zeros(3, 8, 8, dtype=torch.uint8), images_seen=64)
    board.close()
    library.teardown()
    why = "context deadline exceeded"
    assert said == [f"wandb does not start, and shows nothing of this start: {why}"]


def test_a_board_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    wandb.check(None)
    with pytest.raises(ValueError, match=r"board.wandb = 'adm': wandb is not installed"):
        wandb.check("adm")


def test_a_start_whose_timeline_cannot_be_written_ends_without_an_account(tmp_path: Path) -> None:
    (tmp_path / "launch" / "timeline.jsonl").mkdir(parents=True)  # in place of the file
    with open_board(tmp_path, images_seen=0) as board:
        report(board, 1.0, images_seen=64)
        assert board.closing() == []


def test_long_timelines_are_not_added_up_at_every_report(tmp_path: Path) -> None:
    """700,000 reports would otherwise take days."""
    (tmp_path / "launch").mkdir()
    goodput.note_start(tmp_path, last_sign=0.0, job_id=None)
    row = {"event": "report", "time": time.time(), "images": 1, "images_per_second": 1.0}
    with goodput.file(tmp_path).open("a") as file:
        file.write(20_000 * (json.dumps(row) + "\n"))
    with open_board(tmp_path, images_seen=0) as board:
        rows = goodput.read(tmp_path)
        began = time.process_time()
        goodput.account(rows, now=time.time())
        once = time.process_time() - began
        began = time.process_time()
        for images_seen in range(64, 64 * 21, 64):
            report(board, 1.0, images_seen=images_seen)
        assert time.process_time() - began < 10 * once
        assert board.closing()[0].startswith("time: ")
