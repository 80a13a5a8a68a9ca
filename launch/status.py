"""Where runs stand: `RUN/launch/state.json`, `RUN/metrics.jsonl`, checkpoints, and the queue.

The state is the trainer's own account, and a killed run keeps the state "running": whether a run
is alive is asked of the queue, or read from the lease.
"""

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

from data.progress import duration
from launch import queue, records
from trainer import runstate
from trainer.ranks import lease
from trainer.runstate import RunState

# Bytes read from the end of a file: thousands of lines of metrics.
_TAIL = 200_000
# Seconds without a sign of life after which a writer counts as dead.
_QUIET = 60.0

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as its directory and the queue show it."""

    name: str
    images_seen: int
    total: int | None
    rate: float | None
    loss: float | None
    loss_scale: float | None
    #: Seconds since the last line of metrics.
    age: float | None
    checkpoint: str | None
    #: None for a run without state.json.
    restarts: int | None
    job: str
    is_running: bool
    is_finished: bool
    health: str
    #: The last line of events.txt, in which the batch script records what it did.
    event: str | None

    @property
    def left(self) -> str:
        """Time left at the present rate."""
        if self.is_finished:
            return "finished"
        if not self.is_running or not self.rate or self.total is None:
            return ""
        return f"{duration((self.total - self.images_seen) / self.rate)} left"


def read(run: Path) -> Status:
    """The status of a run. What cannot be read is left out.

    A run begun by the last release has no state.json until it is started again; its metrics and
    checkpoints are shown.
    """
    state, rows, total = RunState.read(run), _rows(run / "metrics.jsonl"), _total(run)
    last = rows[-1] if rows else {}
    job, is_running = _job(run)
    saved, _ = _checkpoint(run)
    is_finished = state.state == "finished" if state else total is not None and saved >= total
    return Status(
        name=str(run),
        images_seen=(state.images_seen if state else 0) or last.get("images") or saved,
        total=total,
        rate=last.get("images_per_second"),
        loss=last.get("loss"),
        loss_scale=last.get("loss_scale"),
        age=time.time() - last["time"] if last else None,
        checkpoint=last_checkpoint(run),
        restarts=max(state.starts - 1, 0) if state else None,
        job=job,
        is_running=is_running,
        is_finished=is_finished,
        health="finished" if is_finished else _health(run, state, rows, is_running=is_running),
        event=_last_event(run),
    )


def _health(run: Path, state: RunState | None, rows: Sequence[Row], *, is_running: bool) -> str:
    """How a run that is not finished is doing, or how its last start ended."""
    if not is_running:
        return _ending(state)
    gap, silent = _usual_gap(rows), _silence(run, rows)
    if gap and silent > max(60.0, 10 * gap):
        return f"no metrics for {duration(silent)} (usually every {duration(gap)})"
    if rows and rows[-1].get("skipped") == 1:
        return "every step of the last interval was skipped: gradients overflow"
    return "ok"


def _ending(state: RunState | None) -> str:
    """How the last start ended, by its own account."""
    if state is None:
        return "not running"
    if state.state == "running":
        return "not running; the last start did not record how it ended"
    why = (state.why or "").partition("\n")[0]
    return f"stopped {why}".strip() if state.state == "stopped" else f"{state.state}: {why}"


def _usual_gap(rows: Sequence[Row]) -> float:
    """The median time between two reports, in seconds; 0.0 when it is unknown."""
    times = [row["time"] for row in rows[-20:]]
    gaps = sorted(b - a for a, b in pairwise(times))
    return gaps[len(gaps) // 2] if gaps else 0.0


def _silence(run: Path, rows: Sequence[Row]) -> float:
    """Seconds since the last report, or since the start that has not reported yet."""
    signs = [row["time"] for row in rows[-1:]] + [_written(runstate.file(run))]
    return time.time() - max(signs)


def _job(run: Path) -> tuple[str, bool]:
    """A line about the run's job, and whether it is running."""
    job_id, submitted = records.job_id(run), records.Submitted.of(run)
    if job_id is None:
        return _writer(run)
    where = f"job {job_id}"
    if submitted is not None:
        where += f", {submitted.nodes} x {submitted.gpus_per_node}"
    try:
        state = queue.state(job_id) or f"gone ({queue.end(job_id) or 'no record in Slurm'})"
    except ValueError as error:
        why = str(error).splitlines()[-1]
        return f"{where}: unknown ({why})", _writer(run)[1]
    return f"{where}: {state}", state.startswith("RUNNING")


def _writer(run: Path) -> tuple[str, bool]:
    """A line about the process that holds the lease, and whether it shows signs of life."""
    found = lease.holder(run)
    if found is None or found.is_gone():
        return "no job", False
    quiet = time.time() - _written(run / "launch" / "writer.json")
    if quiet > _QUIET:
        return f"{found}: no sign of life for {duration(quiet)}", False
    return str(found), True


def _written(file: Path) -> float:
    """When a file was last written, in seconds since 1970; 0.0 when it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def last_checkpoint(run: Path) -> str | None:
    """Such as "000000012800, 3 min ago"; None when there is none."""
    images, written = _checkpoint(run)
    return f"{images:012d}, {duration(time.time() - written)} ago" if written else None


def _checkpoint(run: Path) -> tuple[int, float]:
    """The clock of the newest checkpoint and when it was written; zeros when there is none."""
    found = [p for p in run.glob("checkpoints/*") if re.fullmatch(r"\d{12}", p.name)]
    newest = max(found, key=lambda p: p.name, default=None)
    return (int(newest.name), _written(newest)) if newest else (0, 0.0)


def _last_event(run: Path) -> str | None:
    lines = _lines(run / "launch" / "events.txt")
    return lines[-1].partition("  ")[2] if lines else None  # without the date


def _total(run: Path) -> int | None:
    """The images of the whole run, once the trainer has resolved its config."""
    try:
        images = tomllib.loads((run / "config.toml").read_text())["training"]["images"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return images if isinstance(images, int) else None


def _rows(file: Path) -> list[Row]:
    """The last rows of metrics. Lines that are torn or still being written are left out."""
    rows = []
    for line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"images", "time"} <= row.keys():
            rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """The lines at the end of a file that may be long, or missing."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines if size <= _TAIL else lines[1:]


def render(status: Status, *, width: int = 80) -> str:
    """A run in five or six lines of at most `width` characters."""
    seen = f"{status.images_seen:,}"
    if status.total:
        seen += f" of {status.total:,} ({100 * status.images_seen / status.total:.1f} %)"
    rate = f"{status.rate:.1f} images/s" if status.rate and status.is_running else ""
    loss = "none yet" if status.loss is None else f"{status.loss:.4f}"
    scale = "" if status.loss_scale in (None, 1.0) else f"loss scale {status.loss_scale:g}"
    age = "" if status.age is None else f"{duration(status.age)} ago"
    restarts = "" if status.restarts is None else f"{status.restarts} restarts"
    rows = [
        status.name if len(status.name) < width else "..." + status.name[4 - width :],
        _row("images", seen, rate, status.left),
        _row("loss", loss, scale, age),
        _row("saved", status.checkpoint or "nothing yet", restarts),
        _row("job", status.job),
        _row("health", status.health),
    ]
    if status.event:
        rows.append(_row("event", status.event))
    return "\n".join(row[: width - 1] for row in rows) + "\n"


def _row(name: str, *facts: str) -> str:
    return f"  {name:7} {', '.join(fact for fact in facts if fact)}"


def text(runs: Iterable[Path], *, width: int = 80) -> str:
    """The status of all runs, with an empty line between them.

    Raises:
        ValueError: one of them is not a run directory.
    """
    for run in runs:
        if not (run / "launch").is_dir() and not (run / "config.toml").is_file():
            raise ValueError(f"{run} is not a run directory")
    return "\n".join(render(read(run), width=width) for run in runs)


def watch(runs: Sequence[Path], *, seconds: float = 2.0) -> None:
    """Show the status every few seconds, until Ctrl-C."""
    try:
        while True:
            width = shutil.get_terminal_size().columns
            shown = text(runs, width=width)
            print(f"\x1b[H\x1b[2J{time.strftime('%H:%M:%S')}\n{shown}", end="", flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()
