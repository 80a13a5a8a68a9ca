"""A line that is drawn again is for a user's terminal alone; times left leave suspensions out."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from data import progress
from tests.support import ranks
from tests.support.ranks import ROOT, environment
from trainer import sample, train
from trainer.ranks import process

WORK = [
    sys.executable,
    "-c",
    "from data.progress import Progress\n"
    "progress = Progress(total=4, shown=True)\n"
    "for _ in range(4): progress.advance()\n"
    "print('done')",
]


def printed(words: Sequence[str]) -> bytes:
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, check=True)
    return done.stdout


def drawn(words: Sequence[str]) -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    subprocess.run(words, cwd=ROOT, env=environment(), stdout=theirs, check=True)
    os.close(theirs)
    found = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # its end is an error
        while part := terminal.read(4096):
            found += part
    return found


def test_progress_is_drawn_on_a_terminal_and_not_into_a_file() -> None:
    assert drawn(WORK).count(b"4 images") == 4
    assert printed(WORK) == b"done\n"


def test_a_line_after_the_last_unit_stands_alone_on_a_terminal() -> None:
    shown = ""
    for text in drawn(WORK).decode().replace("\r\n", "").split("\r"):
        shown = text + shown[len(text) :]
    assert shown.rstrip() == "done"


def test_items_are_counted_once_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    said: list[str] = []
    shown = progress.Progress(total=3, say=said.append)
    seen = [(item, len(said)) for part in ("ab", "c") for item in shown.over(part)]
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert [line.partition(",")[0] for line in said] == [f"{n} of 3 images" for n in (1, 2, 3)]


def test_the_terminal_that_mpirun_gives_rank_0_is_nobodys() -> None:
    said = printed(["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "1", *WORK])
    assert said.replace(b"\r", b"") == b"done\n"


def work(tool: str, words: list[str]) -> int:
    """A rank that counts as suspended where it is stopped for a second and a half."""
    process.STOPPED_FOR = 1.5
    return {"train": train, "sample": sample}[tool].main(words)


def spent(text: str) -> list[float]:
    """The seconds of work by which each line has reckoned its time left."""
    found, units = [], {"d": 86400, "h": 3600, "min": 60, "s": 1}
    for *counts, left in re.findall(r"(?:images|batch) (\S+) of ([\d,]+)\b.*/s,? +(.*) left", text):
        done, total = (int(count.replace(",", "")) for count in counts)
        seconds = sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+) (\w+)", left))
        found.append(seconds * done / (total - done))
    return found


@pytest.mark.parametrize("tool", ["train", "sample"])
def test_time_in_which_the_job_was_suspended_is_in_no_time_left(
    tool: str, tmp_path: Path, tiny: Path, nets: dict[str, list[str]]
) -> None:
    out, long = tmp_path / "out", ["training.images = 1_000_000", "intervals.checkpoint = 8_000"]
    draw = [*nets["base"], "--images", "10000", "--batch", "1", "--steps", "50"]
    words = {
        "train": [
            str(tiny),
            "--run",
            str(out),
            *(word for each in long for word in ("--set", each)),
        ],
        "sample": [*draw, "--out", f"{out}/"],
    }
    job, suspended = ranks.fork(tmp_path / "job", partial(work, tool, words[tool]), ranks=1), 5.0
    end = time.monotonic() + ranks.LIMIT

    def wait_for(lines: int) -> list[float]:
        while len(found := spent(job.text)) < lines:
            assert job.ranks[0].is_alive() and time.monotonic() < end, job.text
            time.sleep(0.01)
        return found

    before, began = wait_for(2), time.monotonic()
    job.signal(0, signal.SIGSTOP)
    time.sleep(suspended)
    job.signal(0, signal.SIGCONT)
    after = wait_for(len(before) + 3)
    ran = time.monotonic() - began - suspended
    job.kill()
    assert after[-1] - before[-1] < ran + 1
