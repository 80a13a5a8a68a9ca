"""Slurm: a job as the batch script for `sbatch`.

One `srun` task per GPU and no second launcher. Before the time limit, and when preempted, the ranks
save and leave with status 75, and the job requeues itself until the run is finished. After a node
failure Slurm itself requeues the job. The script is plain bash: it runs outside of any container,
on nodes whose own Python may be old.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.exits import REFUSED, TO_BE_CONTINUED
from launch.job import Job, preamble
from launch.queue import BUSY, kept
from launch.shell import command, fill, quoted, sbatch_path

# Python has no signal handlers before the trainer's first line: either signal would kill a rank.
_WITHOUT_SIGNALS = ("sh", "-c", 'trap "" USR1 TERM; exec "$0" "$@"')


def text(job: Job) -> str:
    """The batch script of one run."""
    header = _header(job, output=sbatch_path(job.records, "slurm-%j.out"))
    python, seconds = job.cluster.python, job.cluster.seconds_to_save
    check = ""
    if job.check:
        srun = _srun(job, python, *job.check_words)
        check = fill("slurm-check.sh", srun=srun, refused=REFUSED) + "\n"
    body = fill(
        "slurm.sh",
        name=job.name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        run=quoted([job.run]),
        tenth=f"{seconds / 10:g}",
        seconds=f"{seconds * 9 / 10:g}",
        # Slurm may send the signal a minute early.
        margin=seconds + 60,
        preamble=preamble(job),
        check=check,
        srun=_srun(job, *_WITHOUT_SIGNALS, python, *job.rank_words),
        refused=REFUSED,
        more=TO_BE_CONTINUED,
        kept=" | ".join(kept(header)),
        busy=" | ".join(f'*"{words}"*' for words in BUSY),
    )
    return f"{header}\n{body}\n"


def directory_of(jobs: Sequence[Job]) -> Path:
    """Where the files of an array are: the directory that holds all its runs."""
    return Path(os.path.commonpath([job.run.parent for job in jobs]))


def array_text(jobs: Sequence[Job], *, at_most: int) -> str:
    """The batch script of an array that runs the jobs' own scripts, `at_most` at once.

    The jobs have the same size and cluster; each one's script is already in its run directory.
    """
    directory, array = directory_of(jobs), f"0-{len(jobs) - 1}%{at_most}"
    output = sbatch_path(directory, "sweep-%A-%a.out")
    # sbatch would take what follows a space for another option, and what follows # for a comment.
    name = re.sub(r"[^\w.-]+", "-", f"{directory.name}-sweep")
    header = _header(jobs[0], output=output, array=array, name=name)
    scripts = "\n".join(f"  {quoted([job.script])}" for job in jobs)
    start = 'exec bash "${scripts[$SLURM_ARRAY_TASK_ID]}"'
    return f"{header}\nscripts=(\n{scripts}\n)\n{start}\n"


def _header(job: Job, *, output: str, array: str | None = None, name: str | None = None) -> str:
    slurm = job.cluster.slurm
    options: dict[str, object] = {
        "job-name": name or job.name,
        "array": array,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        **_gpus(job),
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "signal": f"B:USR1@{job.cluster.seconds_to_save}",
        "output": output,
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # The last line counts: a site may say --no-requeue in its options.
    requeue = "--requeue" if slurm.requeue else "--no-requeue"
    lines += ["--open-mode=append", requeue, *slurm.options]
    return "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines)


def _gpus(job: Job) -> dict[str, str]:
    """The option that requests the GPUs of a node, or of each of its tasks."""
    gres, flag = job.cluster.slurm.gres, job.cluster.slurm.gpus_flag
    if gres == "none" or job.cluster.cpu:
        return {}
    count = 1 if flag == "gpus-per-task" else job.gpus_per_node
    kind = gres if flag == "gres" else gres.partition(":")[2]
    return {flag: f"{kind}:{count}" if kind else f"{count}"}


def _srun(job: Job, *program: str) -> str:
    """One task per GPU.

    When one ends, the others have a minute to end by themselves. --kill-on-bad-exit=1 would kill
    them at once, before they report their exit status and the rank that was lost.
    """
    container = job.cluster.container
    options = container.srun_options(directory=job.directory) if container else ()
    inside: tuple[str, ...] = ()
    if container:
        inside = container.command(directory=job.directory, environment=job.environment)
    # Since Slurm 22.05 srun does not inherit the job's number of CPUs.
    cpus = job.cluster.slurm.cpus_per_task
    per_task = [f"--cpus-per-task={cpus}"] if cpus else []
    # A job submitted with --export=NONE would hide the script's environment from its ranks. They
    # use no MPI: on a node that was lost, what PMIx left would keep the requeued job from starting.
    ends = ("--export=ALL", "--mpi=none", "--kill-on-bad-exit=0", "--wait=60", "--label")
    start = command("srun", *ends, *per_task, *options)
    return f"{start} \\\n  {command(*inside, *program)}"
