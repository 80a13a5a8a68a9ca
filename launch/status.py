"""Where runs stand: read from their directories, and from the queue."""

import json
import os
import re
import shutil
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch import slurm, snapshot, writer

_TAIL = 200_000  # bytes; thousands of lines of metrics


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as its directory shows it."""

    name: str
    images: int
    total: int | None
    rate: float | None
    loss: float | None
    loss_scale: float | None
    #: Seconds since the last line of metrics.
    age: float | None
    checkpoint: str | None
    restarts: int
    job: str
    is_running: bool
    #: Whether the last checkpoint is the run's end.
    is_finished: bool
    health: str

    @property
    def left(self) -> str:
        """Time left at the present rate."""
        if self.is_finished:
            return "finished"
        if not self.is_running or not self.rate or self.total is None:
            return ""
        return f"{duration((self.total - self.images) / self.rate)} left"


def read(run: Path) -> Status:
    """The status of a run."""
    rows = _last_rows(run / "metrics.jsonl")
    last = rows[-1] if rows else {}
    job, is_running = _job(run)
    age = time.time() - last["time"] if last else None
    total = _total(run)
    is_finished = total is not None and _checkpoint(run)[0] >= total
    return Status(
        name=str(run),
        images=last.get("images", 0),
        total=total,
        rate=last.get("images_per_second"),
        loss=last.get("loss"),
        loss_scale=last.get("loss_scale"),
        age=age,
        checkpoint=last_checkpoint(run),
        restarts=_restarts(run / "log.txt"),
        job=job,
        is_running=is_running,
        is_finished=is_finished,
        health=_health(run, rows, is_running=is_running, is_finished=is_finished),
    )


def _health(
    run: Path, rows: Sequence[dict[str, Any]], *, is_running: bool, is_finished: bool
) -> str:
    """The first thing that is wrong, or what happened last."""
    events = _lines(run / "launch" / "events.txt")
    if is_finished:
        return "finished"
    if not is_running:
        lost = [line for line in _lines(run / "log.txt")[-3:] if re.search(r"lost: |hung: ", line)]
        said = lost or events
        return said[-1].partition("  ")[2] if said else "nobody trains it"  # without the date
    gap = _usual_gap(rows)
    silent = time.time() - rows[-1]["time"] if rows else 0.0
    if gap and silent > max(60.0, 10 * gap):
        return f"silent for {duration(silent)}; it used to report every {duration(gap)}"
    if rows and rows[-1].get("skipped") == 1:
        return "every step of the last interval was skipped: gradients overflow"
    return "ok"


def _usual_gap(rows: Sequence[dict[str, Any]]) -> float:
    """The middle one of the last times between two reports, in seconds."""
    times = [row["time"] for row in rows[-20:]]
    gaps = sorted(b - a for a, b in pairwise(times))
    return gaps[len(gaps) // 2] if gaps else 0.0


def _job(run: Path) -> tuple[str, bool]:
    """What is known of the run's job, and whether it works on the run."""
    submitted, number = snapshot.Submitted.of(run), snapshot.number(run)
    if number:
        assert submitted is not None
        where = f"job {number}, {submitted.nodes} x {submitted.gpus_per_node}"
        try:
            state = slurm.state(number) or f"gone ({slurm.end(number) or 'forgotten by Slurm'})"
        except ValueError as error:
            state = f"unknown ({error})"
        return f"{where}: {state}", state.startswith("RUNNING")
    found = writer.holder(run)
    if found is None or found.is_gone():
        return "no job", False
    quiet = time.time() - (run / "launch" / "writer.json").stat().st_mtime
    if quiet > 60:
        return f"{found}: no sign of life for {duration(quiet)}", False
    return str(found), True


def last_checkpoint(run: Path) -> str | None:
    """Such as "000000012800, 3 min ago"."""
    images, written = _checkpoint(run)
    return f"{images:012d}, {duration(time.time() - written)} ago" if written else None


def _checkpoint(run: Path) -> tuple[int, float]:
    """The clock of the newest checkpoint and when it was written; zeros when there is none."""
    found = [p for p in run.glob("checkpoints/*") if re.fullmatch(r"\d{12}", p.name)]
    newest = max(found, key=lambda p: p.name, default=None)
    return (int(newest.name), newest.stat().st_mtime) if newest else (0, 0.0)


def _restarts(log: Path) -> int:
    try:
        with log.open(errors="replace") as lines:
            return sum("resumes from checkpoint" in line for line in lines)
    except FileNotFoundError:
        return 0


def _total(run: Path) -> int | None:
    """The images of the whole run, once the trainer has resolved its config."""
    try:
        config = tomllib.loads((run / "config.toml").read_text())
    except FileNotFoundError:
        return None
    images: int = config["training"]["images"]
    return images


def _last_rows(file: Path) -> list[dict[str, Any]]:
    """The last rows of metrics, less a line that is just being written, or that was torn."""
    rows = []
    for line in _lines(file):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _lines(file: Path) -> list[str]:
    """The lines at the end of a file that may be long, or not be there."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines if size <= _TAIL else lines[1:]


def render(status: Status, *, width: int = 80) -> str:
    """A run in five lines of at most `width` characters."""
    total = f" of {status.total:,}" if status.total else ""
    percent = f" ({100 * status.images / status.total:.1f} %)" if status.total else ""
    rate = f"{status.rate:.1f} images/s" if status.rate and status.is_running else ""
    loss = "" if status.loss is None else f"{status.loss:.4f}"
    scale = "" if status.loss_scale in (None, 1.0) else f"loss scale {status.loss_scale:g}"
    age = "" if status.age is None else f"{duration(status.age)} ago"
    rows = [
        status.name if len(status.name) < width else "..." + status.name[4 - width :],
        _row("images", f"{status.images:,}{total}{percent}", rate, status.left),
        _row("loss", loss or "none yet", scale, age),
        _row("saved", status.checkpoint or "nothing yet", f"{status.restarts} restarts"),
        _row("job", status.job),
        _row("health", status.health),
    ]
    return "\n".join(row[: width - 1] for row in rows) + "\n"


def _row(name: str, *facts: str) -> str:
    return f"  {name:7} {', '.join(fact for fact in facts if fact)}"


def text(runs: Iterable[Path], *, width: int = 80) -> str:
    """All runs, one under the other.

    Raises:
        ValueError: one of them is no run directory.
    """
    for run in runs:
        if not (run / "launch").is_dir() and not (run / "config.toml").is_file():
            raise ValueError(f"{run} is no run directory")
    return "\n".join(render(read(run), width=width) for run in runs)


def watch(runs: Sequence[Path], *, seconds: float = 2.0) -> None:
    """Draw the status again and again, until Ctrl-C."""
    try:
        while True:
            width = shutil.get_terminal_size().columns
            shown = text(runs, width=width)
            print(f"\x1b[H\x1b[2J{time.strftime('%H:%M:%S')}\n{shown}", end="", flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


def duration(seconds: float) -> str:
    """Such as "3 d 4 h", "2 h 12 min", "41 s": the two largest units."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
