"""Machines without a scheduler: a job as a bash script for mpirun, `deepspeed` or torchrun."""

from launch.job import Job, preamble
from launch.shell import command, fill, quoted
from trainer.ranks.lease import stop_file


def text(job: Job) -> str:
    """The script that starts a job from this machine; run it with bash.

    Raises:
        KeyError: the cluster's launcher is a scheduler.
    """
    render = {"mpirun": _mpirun, "deepspeed": _deepspeed, "torchrun": _torchrun, "alone": _alone}
    start = render[job.cluster.launcher](job)
    what = f"{job.name}: {job.nodes} x {job.gpus_per_node} ranks by {job.cluster.launcher}"
    return f"#!/bin/bash\n# {what}.\n{preamble(job)}\n\n{start.rstrip()}\n"


def _mpirun(job: Job) -> str:
    """Remote ranks get only those variables that the command names."""
    begin = command(*(_mpich(job) if job.cluster.mpi == "mpich" else _openmpi(job)))
    programs = [job.check_words, job.train_words] if job.check else [job.train_words]
    return " &&\n".join(
        f"{begin} \\\n  {command(job.cluster.python, *words)}" for words in programs
    )


def _openmpi(job: Job) -> list[object]:
    gpus = job.gpus_per_node
    exports = [w for name, v in job.environment.items() for w in ("-x", f"{name}={v}")]
    slots = ",".join(f"{host}:{gpus}" for host in job.cluster.hosts)
    placement = ["--host", slots, "--map-by", f"ppr:{gpus}:node", "--bind-to", "none"]
    return ["mpirun", "-np", job.ranks, *placement, "-x", "PATH", *exports, *job.cluster.options]


def _mpich(job: Job) -> list[object]:
    exports = [w for name, v in job.environment.items() for w in ("-genv", name, v)]
    placement = ["-ppn", job.gpus_per_node, "-hosts", ",".join(job.cluster.hosts)]
    return ["mpiexec", "-n", job.ranks, *placement, *exports, *job.cluster.options]


def _deepspeed(job: Job) -> str:
    """The runner sends the variables in DS_ENV_FILE to every machine."""
    hostfile, exports = job.records / "hostfile", job.records / "deepspeed_env"
    environment = [f"{name}={value}" for name, value in job.environment.items()]
    hosts = [f"{host} slots={job.gpus_per_node}" for host in job.cluster.hosts]
    runner = [job.cluster.python, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile]
    options = ["--launcher", "pdsh", "--no_local_rank", "--master_port", job.cluster.port]
    start = command(*runner, *options, *job.cluster.options, "--module", *job.train_words[1:])
    lines = [
        f"printf '%s\\n' {quoted(hosts)} > {quoted([hostfile])}",
        f"printf '%s\\n' PATH=\"$PATH\" {quoted(environment)} > {quoted([exports])}",
        f"export DS_ENV_FILE={quoted([exports])}",
        start,
    ]
    return "\n".join(lines)


def _torchrun(job: Job) -> str:
    """The script runs itself again by ssh on every machine; torchrun restarts lost ranks."""
    hosts = job.cluster.hosts
    size = [f"--nnodes={job.nodes}", f"--nproc-per-node={job.gpus_per_node}"]
    meeting = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0]}:{job.cluster.port}",
        f"--rdzv-id={job.name}",
        "--rdzv-conf=join_timeout=600,last_call_timeout=5",
    ]
    torchrun = [job.cluster.python, "-m", "torch.distributed.run", *size, *meeting]
    options = ["--max-restarts=3", *job.cluster.options]
    return fill(
        "torchrun.sh",
        stop=quoted([stop_file(job.run)]),
        hosts=quoted(hosts),
        seconds=job.cluster.seconds_to_save,
        command=command(*torchrun, *options, "-m", "--", *job.train_words[1:]),
    )


def _alone(job: Job) -> str:
    if job.ranks == 1:
        return command(job.cluster.python, *job.train_words)
    torchrun = [job.cluster.python, "-m", "torch.distributed.run", "--standalone"]
    options = [f"--nproc-per-node={job.gpus_per_node}", *job.cluster.options]
    return command(*torchrun, *options, "-m", "--", *job.train_words[1:])
