"""Machines without a scheduler: a job as a bash script for mpirun, `deepspeed` or torchrun.

The launcher starts the same script again on the machines, with a word that says what to do there.
So the site's setup and environment reach every rank, and no launcher has anything to quote.
"""

import shlex

from data.exits import REFUSED
from launch.job import Job, preamble
from launch.shell import command, fill, quoted
from trainer.run.lease import stop_file

# Firewalls forget a connection that is idle, as that to a machine whose ranks print nothing, and
# ssh would wait for its end for ever.
_ALIVE = "-o ServerAliveInterval=30 -o ServerAliveCountMax=30"


def text(job: Job) -> str:
    """The script that starts a job from this machine; run it with bash."""
    what = f"{job.name}: {job.nodes} x {job.gpus_per_node} ranks by {job.cluster.launcher}"
    if job.cluster.launcher == "alone":
        body = fill("alone.sh", refused=REFUSED, preamble=preamble(job), start=_alone(job))
    else:
        render = {"mpirun": _mpirun, "deepspeed": _deepspeed, "torchrun": _torchrun}
        modes, start = render[job.cluster.launcher](job)
        body = fill(
            "hosts.sh",
            refuse=fill("refuse.sh", refused=REFUSED),
            preamble=preamble(job),
            python=quoted([job.cluster.python]),
            modes=modes,
            before=_before(job),
            stop=quoted([stop_file(job.run)]),
            start=start,
        )
    return f"#!/bin/bash\n# {what}.\n{body}\n"


def _rank_modes(job: Job) -> str:
    """What the script does as a rank: the check, or training."""
    words = {"check": job.check_words} if job.check else {}
    modes = {**words, "rank": job.rank_words}
    return "\n".join(f"  {m}) exec {command(job.cluster.python, *w)} ;;" for m, w in modes.items())


def _before(job: Job) -> str:
    """What the script checks before it starts anything: its programs, and all machines by ssh."""
    options, launcher = job.cluster.options, job.cluster.launcher
    if launcher == "mpirun":
        return "need mpiexec" if job.cluster.mpi == "mpich" else "need mpirun"
    hosts = f"hosts=({quoted(job.cluster.hosts)})"
    reach = fill("reach.sh", command=quoted([quoted(["bash", job.script, "try"])]))
    if launcher == "torchrun":
        return f"{hosts}\nneed ssh\n{reach}\n{fill('clocks.sh')}"
    if "--launcher" in options or "--no_ssh_check" in options:
        return ""  # by other means than ssh and pdsh, perhaps
    return f"{hosts}\nneed ssh pdsh\n{reach}"


def _mpirun(job: Job) -> tuple[str, str]:
    gpus, hosts = job.gpus_per_node, job.cluster.hosts
    start: list[object]
    if job.cluster.mpi == "mpich":
        start = ["mpiexec", "-n", job.ranks, "-ppn", gpus, "-hosts", ",".join(hosts)]
        start += ["-genv", "I_MPI_PIN", "off"]  # Intel's binds a rank, with its workers, to a core
    else:
        start = ["mpirun", "-np", job.ranks, "--host", ",".join(f"{host}:{gpus}" for host in hosts)]
        start += ["--map-by", f"ppr:{gpus}:node", "--bind-to", "none", "-x", "PATH"]
    begin = command("begin", *start, *job.cluster.options)
    modes = ["check", "rank"] if job.check else ["rank"]
    starts = [f"{begin} bash {quoted([job.script])} {mode} && finish" for mode in modes]
    return _rank_modes(job), " &&\n".join(starts)


def _deepspeed(job: Job) -> tuple[str, str]:
    """The runner quotes neither the directory nor what it hands on: it gets nothing to quote."""
    hostfile, python = quoted([job.records / "hostfile"]), job.cluster.python
    hosts = [f"{host} slots={job.gpus_per_node}" for host in job.cluster.hosts]
    if "/" in python:
        python = str(job.directory / python)
    runner = ["begin", "env", "-u", "PYTHONPATH", python, "-m", "deepspeed.launcher.runner"]
    options = ["--launcher", "pdsh", "--force_multi", "--no_python", "--no_local_rank"]
    options += ["--master_port", str(job.port), *job.cluster.options]
    start = command(*runner, "--hostfile", job.records / "hostfile", *options)
    lines = [
        f"printf '%s\\n' {quoted(hosts)} > {hostfile}",
        f'export PDSH_SSH_ARGS_APPEND="${{PDSH_SSH_ARGS_APPEND-}} {_ALIVE}"',
        "cd /",
        f"{start} \\\n  bash {quoted([_for_remote_bash(str(job.script))])} rank",
        "finish",
    ]
    return _rank_modes(job), "\n".join(lines)


def _for_remote_bash(path: str) -> str:
    """A path as another bash reads it, without spaces, quotes and the %h and %n of pdsh."""
    if shlex.quote(path) == path and "%" not in path:
        return path
    plain = "".join(c if c.isalnum() or c in "/-_." else _escaped(c) for c in path)
    return f"$'{plain}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _torchrun(job: Job) -> tuple[str, str]:
    """torchrun on every machine, by ssh; it restarts lost ranks."""
    first = job.cluster.hosts[0].rpartition("@")[2]
    options = [
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.gpus_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first}:{job.port}",
        f"--rdzv-id={job.name}",
        "--max-restarts=3",
        *job.cluster.options,
    ]
    node = fill(
        "torchrun-node.sh",
        seconds=job.cluster.seconds_to_save,
        first=quoted([first]),
        python=quoted([job.cluster.python]),
        options=command(*options, "-m", "--", *job.rank_words[1:]),
    )
    again = quoted([quoted(["bash", job.script, "node"])])
    begin = f'begin ssh {_ALIVE} "$host" {again}" ${{host#*@}}"'
    return node, f'for host in "${{hosts[@]}}"; do\n  {begin}\ndone\nfinish'


def _alone(job: Job) -> str:
    if job.ranks == 1:
        return f"exec {command(job.cluster.python, *job.rank_words)}"
    options = [f"--nproc-per-node={job.gpus_per_node}", *job.cluster.options]
    return fill(
        "alone-ranks.sh",
        seconds=job.cluster.seconds_to_save,
        python=quoted([job.cluster.python]),
        options=command(*options, "-m", "--", *job.rank_words[1:]),
    )
