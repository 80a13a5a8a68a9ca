"""Where runs stand: `RUN/launch/state.json`, `RUN/metrics.jsonl`, checkpoints, and the queue.

The state is the trainer's own account, and a killed run keeps the state "running": whether a run
is alive is asked of the queue, or read from the lease.
"""

import math
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.progress import duration
from launch import queue, records
from launch.signs import Signs
from trainer.run import goodput, history, lease, runstate
from trainer.run.goodput import Goodput
from trainer.run.history import Row
from trainer.run.runstate import RunState

# Seconds after which a start without metrics is reported as such: as long as ranks are waited for.
_LONG_START = 600.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as its directory and the queue show it."""

    name: str
    #: Whether it is a job of `python -m launch sample`, whose images are counted in its output.
    is_sampling: bool
    images_seen: int
    total: int | None
    rate: float | None
    #: NaN where it was not finite.
    loss: float | None
    loss_scale: float | None
    #: Seconds since the last line of metrics, by the clock of the run's files.
    age: float | None
    checkpoint: str | None
    #: None for a run without state.json.
    restarts: int | None
    job: str
    is_running: bool
    is_finished: bool
    health: str
    #: Where its time went; None for a run that no release with a timeline has started.
    goodput: Goodput | None
    #: The last line of events.txt, in which the batch script records what it did.
    event: str | None

    @property
    def seconds_left(self) -> float | None:
        """Time left at the present rate and the present share of other work; None if unknown."""
        if self.is_finished or not self.is_running or not self.rate or self.total is None:
            return None
        share = self.goodput.training_share if self.goodput else 1.0
        return (self.total - self.images_seen) / (self.rate * share)

    @property
    def left(self) -> str:
        """Time left in words."""
        if self.is_finished:
            return "finished"
        return "" if self.seconds_left is None else f"{duration(self.seconds_left)} left"


def read(run: Path, *, signs: Signs | None = None) -> Status:
    """The status of a run. What cannot be read is left out.

    `signs` has looked at the run; if None, that is done here. A run begun by the last release has
    no state.json until it is started again; its metrics and checkpoints are shown.

    Raises:
        ValueError: it is not a run directory.
        OSError: it cannot be read.
    """
    if not (run / "launch").is_dir() and not (run / "config.toml").is_file():
        raise ValueError(not_a_run(run))
    if signs is None:
        signs = Signs()
        signs.look([run])
    state, total, now, timeline = RunState.read(run), _total(run), signs.now(run), goodput.read(run)
    # The clock of the machine that writes the rows may be ahead of that of the files.
    ahead = goodput.ahead(run, timeline, is_live=signs.is_alive(run))
    rows = [{**row, "time": row["time"] - ahead} for row in history.reports(run)]
    last: Row = next((row for row in reversed(rows) if "loss" in row), {})
    job, is_running = _job(run, signs)
    saved, _ = _checkpoint(run)
    is_sampling = is_of_drawing(run)
    finished = is_finished(run)
    if finished:
        health = "finished"
    elif ": SUSPENDED" in job:
        health = "suspended: no rank runs until Slurm resumes the job"
    elif not is_running:
        health = _ending(state)
    elif is_sampling and state is not None and state.state == "running":
        health = _drawing(run, state, now=now)
    else:
        health = _health(run, state, rows, timeline=timeline, now=now, ahead=ahead)
    return Status(
        name=str(run),
        is_sampling=is_sampling,
        images_seen=(state.images_seen if state else 0) or (rows[-1]["images"] if rows else saved),
        total=total,
        rate=_number(last, "images_per_second"),
        loss=_number(last, "loss"),
        loss_scale=_number(last, "loss_scale"),
        age=now - last["time"] if last else None,
        checkpoint=last_checkpoint(run, now=now),
        restarts=max(state.starts - 1, 0) if state else None,
        job=job,
        is_running=is_running,
        is_finished=finished,
        health=health,
        goodput=goodput.account(timeline, now=now + ahead if is_running else None),
        event=_last_event(run),
    )


def not_a_run(run: Path) -> str:
    """What to give in the place of a path that is not a run's."""
    inside = sorted(run.glob("*/config.toml"))
    right = f"it holds {len(inside)}: give {run}/*" if inside else "give the one that --run named"
    there = "" if run.exists() else "there is nothing of this name: "
    return f"{run} is not a run directory; {there}{right}"


def is_of_drawing(run: Path) -> bool:
    """Whether the directory is of a job that draws, and so of no run."""
    return not any((run / f).exists() for f in ("config.toml", "launch/preset.toml"))


def is_finished(run: Path) -> bool:
    """Whether a run is at its end; one begun by the last release, whether that is saved."""
    state, total = RunState.read(run), _total(run)
    if state is not None:
        return state.state == "finished"
    return total is not None and _checkpoint(run)[0] >= total


def _number(row: Row, name: str) -> float | None:
    """A value of a row; NaN where it was not finite, which the trainer writes as null."""
    if name not in row:
        return None
    value = row[name]
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan


def _health(
    run: Path,
    state: RunState | None,
    rows: Sequence[Row],
    *,
    timeline: Sequence[Row],
    now: float,
    ahead: float,
) -> str:
    """How a run that trains is doing."""
    if (state is None and not rows) or (state is not None and state.state != "running"):
        return "starting: the run is not claimed yet"
    # Where all steps of an interval were refused, it has no loss.
    last = next((row for row in reversed(rows) if row.keys() & {"loss", "skipped"}), {"time": 0.0})
    since = goodput.starting(timeline, now=now + ahead)
    if not timeline:
        since = _unreported(run, state, last if rows else None, now=now)
    if since is not None:
        return _starting(since)
    seen = max(rows[-1]["time"] if rows else 0.0, _written(runstate.file(run)))
    gap, silent = history.usual_gap(rows), now - seen
    if gap and silent > max(60.0, 10 * gap):
        return f"no metrics for {duration(silent)} (usually every {duration(gap)})"
    if math.isnan(_number(last, "loss") or 0.0):
        return "diverged: the loss is not finite"
    if last.get("skipped") == 1:
        if "loss" not in last:
            return "every step of the last interval was skipped: log.txt says why"
        return "every step of the last interval was skipped: gradients overflow"
    return "ok"


def _unreported(run: Path, state: RunState | None, last: Row | None, *, now: float) -> float | None:
    """As `goodput.starting`, of a run without a timeline, by its last row.

    An earlier release notes no beginning, and its state again and again.
    """
    began = state.began if state is not None else None
    if began is None and last is None:
        began = _written(runstate.file(run))
    return now - began if began is not None and (last or {"time": 0.0})["time"] < began else None


def _drawing(run: Path, state: RunState, *, now: float) -> str:
    """Of a job that draws: it notes each batch, and has no metrics."""
    noted = duration(now - _written(runstate.file(run)))
    if state.checkpoint is None:
        return f"starting for {noted}: nothing drawn yet"
    return f"drawing: {int(state.checkpoint):,} batches so far, last change {noted} ago"


def _starting(seconds: float) -> str:
    """Of a start that has not reported yet."""
    if seconds > _LONG_START:
        return f"no metrics since it started {duration(seconds)} ago: see its output, and its log"
    return f"starting for {duration(seconds)}: no metrics yet"


def _ending(state: RunState | None) -> str:
    """How the last start ended, by its own account."""
    if state is None:
        return "not running"
    if state.state == "running":
        return "not running; the last start did not record how it ended"
    why = (state.why or "").partition("\n")[0]
    return f"stopped {why}".strip() if state.state == "stopped" else f"{state.state}: {why}"


def _job(run: Path, signs: Signs) -> tuple[str, bool]:
    """A line about the run's job, and whether it is running."""
    job_id = signs.job_id(run)
    if job_id is None:
        return _writer(run, signs)
    where = f"job {queue.shown(job_id)}"
    submitted = records.Submitted.of(run)
    if submitted is not None:
        where += f", {submitted.nodes} x {submitted.gpus_per_node}"
    try:
        job = signs.job(run)
    except ValueError as error:
        return f"{where}: unknown ({str(error).splitlines()[-1]})", signs.is_alive(run)
    if job is not None and job.is_queued:
        way_on = queue.way_on(job_id, job.state, stop=lease.stop_command(run))
        return ": ".join(filter(None, (where, job.state, way_on))), job.state.startswith("RUNNING")
    if job is not None and not job.has_ended:  # hidden from this user, or stale
        return f"{where}: {job.state} by sacct, not shown by squeue", signs.is_alive(run)
    if job is None and signs.is_alive(run):  # of another cluster, or hidden from this user
        return f"{where}: running; this Slurm shows no record of it", True
    return f"{where}: gone ({job.state if job else 'no record in Slurm'})", False


def _writer(run: Path, signs: Signs) -> tuple[str, bool]:
    """A line about the process that holds the lease, and whether it shows signs of life.

    Ranks without a scheduler take minutes to claim the run, and their job holds its lock meanwhile.
    """
    found = lease.holder(run)
    if found is None or found.is_gone():
        is_begun = records.is_claimed(run)
        return ("`python -m launch` starts or ends it", True) if is_begun else ("no job", False)
    if not signs.is_alive(run):
        quiet = time.time() - _written(run / "launch" / "writer.json")
        return f"{found}: no sign of life for {duration(quiet)}", False
    return str(found), True


def _written(file: Path) -> float:
    """When a file was last written, in seconds since 1970; 0.0 when it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def last_checkpoint(run: Path, *, now: float) -> str | None:
    """Such as "000000012800, 3 min ago"; None when there is none."""
    images, written = _checkpoint(run)
    return f"{images:012d}, {duration(now - written)} ago" if written else None


def _checkpoint(run: Path) -> tuple[int, float]:
    """The clock of the newest checkpoint and when it was written; zeros when there is none."""
    with suppress(OSError):
        for newest in runstate.committed(run / "checkpoints"):
            return int(newest.name), _written(newest)
    return 0, 0.0


def _last_event(run: Path) -> str | None:
    try:
        lines = (run / "launch" / "events.txt").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return lines[-1].partition("  ")[2] if lines else None  # without the date


def _total(run: Path) -> int | None:
    """The images of the whole run, once the trainer has resolved its config."""
    try:
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        images = config["training"]["images"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return images if isinstance(images, int) else None
