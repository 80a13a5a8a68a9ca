"""Slurm's queue: submit, query, cancel. The only module that talks to Slurm."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Variables by which Slurm's commands find the cluster and prove who asks.
_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SLURM_JWT")
# Options whose variables users set once in their shell, such as SBATCH_ACCOUNT. They count where
# the script has no such option; for Slurm alone a variable would outrank the script.
_DEFAULTS = ("account", "partition", "qos", "reservation")


def submit(script: Path) -> str:
    """Submit a batch script; returns the job id.

    Raises:
        ValueError: Slurm rejects it.
    """
    env = environment(os.environ, text=script.read_text())
    return _slurm("sbatch", "--parsable", str(script), env=env).strip().partition(";")[0]


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
        found = _slurm("squeue", "-h", "-j", job_id, "-o", "%T|%r").split("\n")[0]
    except ValueError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    name, _, reason = found.partition("|")
    return (f"{name} ({reason})" if reason not in ("", "None") else name) or None


def end(job_id: str) -> str | None:
    """How a job ended that is no longer in the queue, such as "CANCELLED by 0".

    None when Slurm has no record of it: without accounting it keeps one for some minutes.
    """
    try:
        accounted = _slurm("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State").split("\n")[0]
        if accounted:
            return accounted
    except ValueError:
        pass  # no accounting here
    try:
        found = re.search(r" JobState=(\S+)", _slurm("scontrol", "show", "job", "-o", job_id))
    except ValueError:
        return None
    return found[1] if found else None


def cancel(job_id: str) -> None:
    """Remove a job from the queue that has not started."""
    _slurm("scancel", job_id)


def _slurm(*command: str, env: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{command[0]} did not respond: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").split(
            "\n"
        )
        lines = [line.removeprefix(f"{command[0]}: ") for line in said]
        raise ValueError(f"{command[0]}: " + "\n".join(lines))
    return done.stdout
