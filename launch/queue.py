"""Slurm's queue: submit, query, cancel. The only module that talks to Slurm.

A job id is a number, or, as `sbatch --parsable` has it, a number and its cluster ("47;east"): each
cluster of a site counts its own jobs.
"""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch import reasons

# Variables by which Slurm's commands find the cluster and prove who asks.
_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SLURM_JWT")
# Options whose variables users set once in their shell, such as SBATCH_ACCOUNT. They count where
# the script has no such option; for Slurm alone a variable would outrank the script.
_DEFAULTS = ("account", "partition", "qos", "reservation")
# Variables by which users change what Slurm's other commands do: they would hide a job that is
# there, or let scancel wait for a confirmation.
_HABITS = ("SQUEUE_", "SCANCEL_", "SACCT_")
# What sbatch answers, with --parsable and where a site's script leaves that out.
_ANSWER = r"^(?:Submitted batch job )?(\d+)(?:(?:;| on cluster )(\S*))?$"
# States of jobs that have ended, which squeue shows for some minutes more.
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
# States of jobs that wait to be started, also of held ones.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
# What a command says that has lost its answer: Slurm may have done, or do later, what it asked for.
_LOST = ("imed out", "nexpected message", "Zero Bytes")
#: What a command says while Slurm's controller is busy or restarting.
BUSY = (
    *(*_LOST, "nable to contact", "onnection", "standby mode", "temporarily un"),
    "authentication error",  # while munge restarts
)

# Seconds between two questions about the same jobs.
_EVERY = 30.0
# Seconds before each look for a job whose submission has lost its answer.
_PAUSES = (2.0, 5.0, 10.0, 20.0)


class NoAnswer(ValueError):
    """Slurm's controller is busy or restarting. It may do what it was asked for all the same."""


def submit(script: Path) -> str:
    """Submit a batch script; returns the job id, or raises ValueError with what Slurm said."""
    text = script.read_text(encoding="utf-8", errors="surrogateescape")  # as it was written
    env = environment(os.environ, text=text)
    earlier = _jobs_of(script)
    try:
        said = _slurm("sbatch", "--parsable", str(script), env=env)
    except NoAnswer as error:
        if not any(words in str(error) for words in _LOST):
            raise
        said = _submitted(script, besides=earlier, error=error)
    except ValueError as error:
        raise ValueError(reasons.with_way_out(str(error))) from None
    # Some sites' sbatch is a script of their own: it prints a greeting before, or a sentence.
    found = re.findall(_ANSWER, said, re.MULTILINE)
    if not found:
        raise ValueError(
            f"sbatch printed no job id: {said.strip()!r}; see in `squeue --me` whether it is queued"
        )
    return ";".join(part for part in found[-1] if part)


def _jobs_of(script: Path) -> set[str]:
    """The jobs of a batch script that are in the queue, of arrays the ids of the whole.

    Raises:
        NoAnswer: as of `squeue`.
    """
    try:
        shown = _slurm("squeue", "--me", "-h", "-o", "%F|%o")
    except NoAnswer:
        raise
    except ValueError:  # a site may not let its users ask
        return set()
    rows = (line.partition("|") for line in shown.splitlines())
    return {job_id for job_id, _, command in rows if command == str(script)}


def _submitted(script: Path, *, besides: set[str], error: NoAnswer) -> str:
    """The job that Slurm has made of the script, though sbatch ended with `error`.

    Raises:
        ValueError: none is in the queue.
    """
    for pause in _PAUSES:
        time.sleep(pause)
        with suppress(NoAnswer):
            if new := _jobs_of(script) - besides:
                return max(new, key=int)
    raise ValueError(f"{error}; see in `squeue --me` whether it is queued before you rerun this")


def environment(env: Mapping[str, str], *, text: str) -> dict[str, str]:
    """The environment to submit a script of this text in: no variable changes what the text says.

    From within a job, such as that of salloc, sbatch would take over options of that job from the
    variables SBATCH_*, and hand on SLURM_* and SRUN_*, which contradict those of the new job.
    """
    ours = ("SLURM_", "SBATCH_", "SRUN_")
    return {k: v for k, v in env.items() if k in kept(text) or not k.startswith(ours)}


def kept(text: str) -> tuple[str, ...]:
    """The variables of Slurm's that a script of this text may be submitted with."""
    absent = (name for name in _DEFAULTS if f"#SBATCH --{name}=" not in text)
    return (*_REACH, *(f"SBATCH_{name.upper()}" for name in absent))


def state(job_id: str) -> str | None:
    """The state of a queued or running job, such as "RUNNING" or "PENDING (Resources)".

    None when the job is not in the queue.

    Raises:
        ValueError: Slurm does not respond.
    """
    try:
        number, of_cluster = _split(job_id)
        shown = _slurm("squeue", *of_cluster, "-h", "-j", number, "-o", "%T|%r|%P")
    except ValueError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return _in_words(*(shown.partition("\n")[0] + "||").split("|")[:3]) or None


def shown(job_id: str) -> str:
    """A job id in words."""
    return job_id.replace(";", " on cluster ")


def task(job_id: str, index: int) -> str:
    """The id of a job of the array `job_id`."""
    number, semicolon, cluster = job_id.partition(";")
    return f"{number}_{index}{semicolon}{cluster}"


def _split(job_id: str) -> tuple[str, tuple[str, ...]]:
    """The number of a job, and the option of Slurm's commands that names its cluster."""
    number, _, cluster = job_id.partition(";")
    return number, (f"--clusters={cluster}",) if cluster else ()


def is_waiting(state: str) -> bool:
    """Whether a job of this `state` is queued and not started."""
    return state.startswith(_WAITING)


def way_on(job_id: str, state: str, *, stop: str) -> str | None:
    """What to do with a job of this `state` that does not start by waiting; None where it does."""
    number, of_cluster = _split(job_id)
    release = " ".join(("scontrol", *of_cluster, "release", number))
    return reasons.way_on(state, release=release, stop=stop)


@dataclass(frozen=True)
class Entry:
    """A job as Slurm shows it."""

    #: Such as "RUNNING", "PENDING (Resources)", or, of one that has ended, "CANCELLED by 0".
    state: str
    #: Whether squeue shows it as one that has not ended.
    is_queued: bool

    @property
    def has_ended(self) -> bool:
        """Whether that state is one of the last."""
        return self.state.startswith(_ENDED)


class Jobs:
    """What Slurm knows of many jobs: asked with one command for all, and seldom."""

    def __init__(self) -> None:
        self._known: dict[str, Entry] = {}
        self._asked: frozenset[str] = frozenset()
        self._at = -math.inf
        self._fault: ValueError | None = None

    def look(self, job_ids: Iterable[str]) -> None:
        """Ask for these jobs, unless they were asked for within the last `_EVERY` seconds."""
        wanted = frozenset(job_ids)
        if not wanted or (wanted <= self._asked and time.monotonic() < self._at + _EVERY):
            return
        self._asked, self._at, self._fault = wanted, time.monotonic(), None
        try:
            self._known = _ask(wanted)
        except ValueError as error:
            self._fault = error

    def find(self, job_id: str) -> Entry | None:
        """The job as of the last `look`, or None; ValueError where Slurm did not respond."""
        if self._fault is not None:
            raise self._fault
        return self._known.get(job_id)


def _ask(job_ids: Iterable[str]) -> dict[str, Entry]:
    """The jobs that Slurm shows. Each cluster is asked once."""
    ids: dict[tuple[str, ...], dict[str, str]] = {}
    for job_id in job_ids:
        number, of_cluster = _split(job_id)
        ids.setdefault(of_cluster, {})[number] = job_id
    return {
        own[number]: job
        for of_cluster, own in ids.items()
        for number, job in _ask_cluster(own, of_cluster).items()
        if number in own
    }


def _ask_cluster(job_ids: Collection[str], of_cluster: Sequence[str]) -> dict[str, Entry]:
    """The jobs that squeue shows, which keeps ended ones for some minutes, and sacct later."""
    listed = ",".join(sorted(job_ids))
    words = (*of_cluster, "-h", "-r", "-t", "all", "-j", listed, "-o", "%i|%T|%r|%P")
    try:
        shown = _slurm("squeue", *words)
    except ValueError as error:
        if "Invalid job id" not in str(error):
            raise
        shown = ""  # said of a single job alone
    jobs = {}
    for line in shown.splitlines():
        job_id, state, *more = (line + "|||").split("|")[:4]
        jobs[job_id] = Entry(_in_words(state, *more), is_queued=state not in _ENDED)
    gone = [job_id for job_id in job_ids if job_id not in jobs or not jobs[job_id].is_queued]
    return jobs | (_accounted(gone, of_cluster) if gone else {})


def _accounted(job_ids: Iterable[str], of_cluster: Sequence[str]) -> dict[str, Entry]:
    """Jobs that squeue does not show, or shows as ended, in the words of the accounting, if any."""
    listed = ",".join(sorted(job_ids))
    try:
        shown = _slurm("sacct", *of_cluster, "-n", "-X", "-P", "-j", listed, "-o", "JobID,State")
    except ValueError:
        return {}
    rows = (line.partition("|") for line in shown.splitlines())
    return {job_id: Entry(state, is_queued=False) for job_id, _, state in rows if state}


def _in_words(state: str, reason: str, partitions: str) -> str:
    if reason in ("", "None") or state in _ENDED:
        return state
    return reasons.with_reason(state, reason, partitions=partitions)


def cancel(job_id: str) -> None:
    """Remove a job from the queue that has not started."""
    number, of_cluster = _split(job_id)
    _slurm("scancel", *of_cluster, number)


def _slurm(*command: str, env: Mapping[str, str] | None = None) -> str:
    if env is None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(_HABITS)}
    try:
        # A site's greeting may be of another encoding than the user's locale.
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, env=env
        )
    except FileNotFoundError:
        submit = ": use a login node of Slurm, or another `launcher` in the --cluster file"
        way_out = submit if command[0] == "sbatch" else ""
        raise ValueError(f"there is no {command[0]} on this machine{way_out}") from None
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{command[0]} did not respond: {error}") from None
    except OSError as error:
        raise ValueError(f"{command[0]} did not respond: {error}") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        said = re.sub(f"^{command[0]}: ", "", said, flags=re.MULTILINE)
        is_busy = any(words in said for words in BUSY)
        raise (NoAnswer if is_busy else ValueError)(f"{command[0]}: {said}")
    if command[0] == "sbatch":  # a site's words about a job that it takes, and may have changed
        print(done.stderr, end="", file=sys.stderr)
    return done.stdout
