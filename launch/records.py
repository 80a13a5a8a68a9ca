"""The job's files in `RUN/launch/`, and the copy of the code that it runs.

The checkout may change while a job waits in a queue or between its starts; the run does not.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from data import files, version
from launch import hosts, kubernetes, queue, slurm
from launch.job import Job
from launch.shell import quoted
from trainer.config import settings
from trainer.run import lease

ROOT = Path(__file__).parent.parent
_CODE = ("trainer", "data", "launch")
_LOCK = "lock"
_PRESET = "preset.toml"
#: The script of an array, in the directory of its runs.
SWEEP = "sweep.sh"
# Entries of `code/`; copies of earlier releases lack some.
_COPIED = {*_CODE, "ds_config.json", version.COMMIT}
# Entries of `launch/`, of which every run or job has one.
_OURS = {_LOCK, "job.json", "state.json", "writer.json", "timeline.jsonl"}


class Busy(ValueError):
    """A run that a job waits for, or that a process writes."""


@dataclass(frozen=True)
class Submitted:
    """The job that was last started on a run: its launcher, its size, the run's directory."""

    launcher: str
    nodes: int
    gpus_per_node: int
    #: None in records of earlier releases.
    run: str | None = None

    @classmethod
    def of(cls, run: Path) -> "Submitted | None":
        """As recorded in the run directory; None where there is no readable record."""
        try:
            text = (run / "launch" / "job.json").read_text()
            submitted: Submitted = settings.from_json(cls, text)
        except (OSError, ValueError):
            return None
        return submitted

    def is_of(self, run: Path) -> bool:
        """Whether this is a record of the job of `run`, and did not come with a copy of its files.

        A directory on another machine, or one that is gone, is another run's: its job is not ours.
        """
        try:
            return self.run is None or os.path.samefile(self.run, run)
        except OSError:
            return False


def job_id(run: Path) -> str | None:
    """Slurm's id of the run's last job; None where none was submitted."""
    submitted = Submitted.of(run)
    if submitted is not None and not submitted.is_of(run):
        return None
    try:
        found = (run / "launch" / "job").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch(r"\d+(_\d+)?(;\S+)?", found) else None


def keep_job_id(job: Job, job_id: str) -> None:
    """Record the id that Slurm gave a job."""
    files.write(job.records / "job", f"{job_id}\n")


def text(job: Job) -> str:
    """The text of `Job.script`: a shell or batch script, or a manifest."""
    if job.cluster.launcher == "slurm":
        return slurm.text(job)
    if job.cluster.launcher == "kubernetes":
        return kubernetes.manifest(job)
    return hosts.text(job)


def check_directory(run: Path) -> None:
    """Return if a job may write here: nothing, or a run or job is there. Touches nothing.

    Raises:
        ValueError: the directory holds something else.
        OSError: it is none, or cannot be read.
    """
    code, new = _entries(run / "code"), "name a new directory"
    if (run / "code").exists() and not ("trainer" in code and code <= _COPIED):
        raise ValueError(
            f"{run}/code is not the copy of this program that a job runs, and would be replaced: "
            f"move it away, or {new}"
        )
    if _entries(run / "launch") and not is_of_job(run):
        raise ValueError(f"{run}/launch exists and is of no job: {new}")
    inside = _entries(run)
    if inside and not is_of_job(run) and inside.isdisjoint(("config.toml", SWEEP)):
        raise ValueError(f"{run} exists and is no run directory (it has no config.toml): {new}")


def is_of_job(run: Path) -> bool:
    """Whether `RUN/launch/` is of a run or of a job of ours, also of earlier releases."""
    known = _OURS | ({_PRESET} if (run / "code").is_dir() else set())
    return not _entries(run / "launch").isdisjoint(known)


def _entries(directory: Path) -> set[str]:
    """The names in a directory; none where it is not there."""
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


@contextmanager
def claimed(run: Path) -> Iterator[TextIO]:
    """The lock of a run: while it is open, no other `python -m launch` prepares a job of it.

    A job without a scheduler inherits it: a second launch could come before the ranks claim it.

    Raises:
        ValueError: another has it, or the run's path is a link to nothing.
    """
    files.check_link(run)
    directory = run / "launch"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("a") as file:
        if not _lock(file):
            check_free(run)
            raise ValueError(
                f"another `python -m launch` of {run} is starting it, or its job has not ended: "
                f"look at it with `python -m launch {quoted(['status', run])}`"
            )
        yield file


def is_claimed(run: Path) -> bool:
    """Whether another process prepares a job of this run, or is that job, without a scheduler."""
    try:
        with (run / "launch" / _LOCK).open("r+") as file:  # to lock it, and not to make it
            return not _lock(file)
    except OSError:
        return False


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


def check_free(run: Path) -> None:
    """Raise Busy where a job is queued for the run, or a process is writing it."""
    stop = lease.stop_command(run)
    wait = f"wait for it, or stop it with `{stop}`"
    queued = job_id(run)
    state = queue.state(queued) if queued else None
    if queued and state:
        way_on = queue.way_on(queued, state, stop=stop) or wait
        raise Busy(f"job {queue.shown(queued)} of {run} is {state}: {way_on}")
    busy = lease.live_holder(run)
    if busy is not None:
        raise Busy(f"{busy} is writing {run}: {wait}")


def prepare(job: Job) -> None:
    """Copy the code, the preset and DeepSpeed's settings, and write the script.

    Requests and records of an earlier job (`stop`, `failed-at`, `job`, ...) are removed.
    """
    job.records.mkdir(parents=True, exist_ok=True)
    _copy_code(job.code)
    if job.preset is not None:
        _copy(job.preset, job.records / _PRESET)
    if job.ds_config is not None:
        _copy(job.ds_config, job.ds_config_copy)
    for earlier in ("stop", "failed-at", "limited-at", "lost-hosts", "job"):
        (job.records / earlier).unlink(missing_ok=True)
    own = Submitted(job.cluster.launcher, job.nodes, job.gpus_per_node, str(job.run))
    files.write(job.records / "job.json", json.dumps(asdict(own)) + "\n")
    files.write(job.script, text(job))


def _copy(file: Path, to: Path) -> None:
    if not (to.exists() and to.samefile(file)):
        shutil.copyfile(file, to)


def _copy_code(to: Path) -> None:
    partial = to.with_name(".code.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path in _sources():
            copy = partial / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        files.write(partial / version.COMMIT, version.commit(ROOT) + "\n")
    except OSError:  # a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if to.exists():
        to.rename(to.with_name(f".code.{time.time_ns()}"))
    partial.rename(to)
    for old in to.parent.glob(".code.[0-9]*"):
        shutil.rmtree(old)


def _sources() -> Iterator[Path]:
    """The files of the code."""
    yield ROOT / "ds_config.json"
    for package in _CODE:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                yield path
