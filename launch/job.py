"""A run to be started: what it asks for, and the text that starts it, whatever the launcher.

Rendering is pure. The text is what runs: it is kept in the run directory, `--dry-run` prints it,
and the shell (`bash`, `sbatch`, `kubectl`) gets nothing but it.
"""

from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster, quoted
from launch.writer import stop_file


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run on `nodes` machines with a rank for each of their `gpus_per_node` GPUs."""

    run: Path
    nodes: int
    gpus_per_node: int
    cluster: Cluster
    #: Where the user stands: relative paths of the preset, such as the shards', start there.
    directory: Path
    #: Settings of the preset that are changed, as `--set` takes them.
    changes: tuple[str, ...] = ()
    #: Settings of the preset that are left out, as `--unset` takes them.
    absent: tuple[str, ...] = ()
    #: Look the allocation over ahead of the training, and whether it can read these shards.
    check: bool = False
    shards: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        for path in (self.run, self.directory):
            assert path.is_absolute()
        if not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(
                f"--run {self.run}: its last part names the job; use letters, digits, - _ and ."
            )
        if self.cluster.launcher == "alone" and self.nodes > 1:
            raise ValueError(
                f"--nodes {self.nodes}: this is one machine; to use more, set launcher in --cluster"
            )
        hosts, launcher = len(self.cluster.hosts), self.cluster.launcher
        if self.check and launcher not in ("slurm", "mpirun"):
            raise ValueError(
                f"--check: launcher {launcher!r} cannot do it ahead of training; run "
                "`python -m launch check` on every rank yourself, as that launcher starts ranks"
            )
        if launcher in ("mpirun", "deepspeed", "torchrun") and hosts != self.nodes:
            raise ValueError(
                f"--nodes {self.nodes}: {launcher} starts on the machines that `hosts` lists, "
                f"and it lists {hosts}; name as many there"
            )

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def code(self) -> Path:
        """The code that runs: a copy made when the job was submitted."""
        return self.run / "code"

    @property
    def records(self) -> Path:
        """What the launcher keeps: the preset, the text, the job's number, what happened."""
        return self.run / "launch"

    @property
    def training(self) -> tuple[str, ...]:
        """The trainer as words after `python`."""
        sets = [word for change in self.changes for word in ("--set", change)]
        sets += [word for name in self.absent for word in ("--unset", name)]
        return (
            "-m", "trainer.train", f"{self.records}/preset.toml", "--run", str(self.run),
            "--ds-config", f"{self.code}/ds_config.json", "--ranks", str(self.ranks),
            "--patience", str(self.cluster.patience), *sets,
        )  # fmt: skip

    @property
    def checking(self) -> tuple[str, ...]:
        """The look at the allocation as words after `python`."""
        data = ("--data", self.shards) if self.shards else ()
        return ("-m", "launch", "check", "--ranks", str(self.ranks), "--run", str(self.run), *data)

    @property
    def environment(self) -> dict[str, str]:
        """What every rank's environment must have.

        The safe path keeps the current directory, which may be a checkout, out of the imports.
        """
        ours = {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}
        return {**self.cluster.environment, **ours}


def preamble(job: Job) -> str:
    """Where every text begins: the directory, the environment, the site's own lines."""
    exports = [f"export {name}={quoted([value])}" for name, value in job.environment.items()]
    python = Path(job.cluster.python)
    if python.is_absolute():  # the tools beside it go first, as in an activated environment
        exports.insert(0, f"export PATH={quoted([python.parent])}:$PATH")
    return "\n".join([f"cd {quoted([job.directory])}", *job.cluster.setup, *exports])


def local_text(job: Job) -> str:
    """The text for the launchers that are no schedulers; run it with bash.

    Raises:
        ValueError: the cluster's launcher is another.
    """
    render = {"mpirun": _mpirun, "deepspeed": _deepspeed, "torchrun": _torchrun, "alone": _alone}
    if job.cluster.launcher not in render:
        raise ValueError(f"launcher = {job.cluster.launcher!r} is not started from a shell")
    what = f"{job.name}: {job.nodes} x {job.gpus_per_node} ranks by {job.cluster.launcher}"
    start = render[job.cluster.launcher](job)
    return f"#!/bin/bash\n# {what}.\n{preamble(job)}\n\n{start}\n"


def command(*words: object) -> str:
    """A command as the shell reads it, one long option to a line."""
    text = ""
    for word in map(str, words):
        is_option = (word.startswith("--") and word != "--") or word in ("-x", "-genv")
        text += (" \\\n  " if is_option else " " if text else "") + quoted([word])
    return text


def _mpirun(job: Job) -> str:
    """Remote ranks get no more of the environment than is named here."""
    hosts, gpus = job.cluster.hosts, job.gpus_per_node
    if job.cluster.mpi == "mpich":
        exports = [w for name, v in job.environment.items() for w in ("-genv", name, v)]
        start = ["mpiexec", "-n", job.ranks, "-ppn", gpus, "-hosts", ",".join(hosts), *exports]
    else:
        exports = [w for name, v in job.environment.items() for w in ("-x", f"{name}={v}")]
        slots = ",".join(f"{host}:{gpus}" for host in hosts)
        start = ["mpirun", "-np", job.ranks, "--host", slots, "--map-by", f"ppr:{gpus}:node",
                 "--bind-to", "none", "-x", "PATH", *exports]  # fmt: skip
    begin = command(*start, *job.cluster.options)
    programs = [job.checking, job.training] if job.check else [job.training]
    return " &&\n".join(
        f"{begin} \\\n  {command(job.cluster.python, *words)}" for words in programs
    )


def _deepspeed(job: Job) -> str:
    """The runner sends the variables in DS_ENV_FILE to every machine."""
    hostfile, exports = job.records / "hostfile", job.records / "deepspeed_env"
    environment = [f"{name}={value}" for name, value in job.environment.items()]
    hosts = [f"{host} slots={job.gpus_per_node}" for host in job.cluster.hosts]
    module, training = job.training[1], job.training[2:]
    runner = (job.cluster.python, "-m", "deepspeed.launcher.runner")
    return "\n".join([
        f"printf '%s\\n' {quoted(hosts)} > {quoted([hostfile])}",
        f"printf '%s\\n' PATH=\"$PATH\" {quoted(environment)} > {quoted([exports])}",
        f"export DS_ENV_FILE={quoted([exports])}",
        command(*runner, "--hostfile", hostfile, "--launcher", "pdsh", "--no_local_rank",
               "--master_port", job.cluster.port, *job.cluster.options, "--module", module,
               *training),
    ])  # fmt: skip


def _torchrun(job: Job) -> str:
    """Run again by ssh on every machine; torchrun itself starts lost ranks again."""
    hosts = job.cluster.hosts
    elastic = command(
        job.cluster.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.gpus_per_node}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0]}:{job.cluster.port}", f"--rdzv-id={job.name}",
        "--rdzv-conf=join_timeout=600,last_call_timeout=5", "--max-restarts=3",
        *job.cluster.options, "-m", "--", *job.training[1:],
    )  # fmt: skip
    return "\n".join([
        'if [ "$1" != node ]; then',
        f"  trap 'touch {quoted([stop_file(job.run)])}' INT TERM  # the ranks save and leave",
        f"  for host in {quoted(hosts)}; do",
        '    ssh "$host" bash "$(realpath "$0")" node & agents+=($!)',
        "  done",
        '  for agent in "${agents[@]}"; do',
        '    while kill -0 "$agent" 2> /dev/null; do wait "$agent"; done  # a signal ends a wait',
        '    wait "$agent" || status=$?',
        "  done",
        "  exit ${status:-0}",
        "fi",
        "# A rebooted machine must be able to join again, and ranks that shall leave, to save.",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.cluster.slurm.seconds_to_save}",
        elastic,
    ])  # fmt: skip


def _alone(job: Job) -> str:
    if job.ranks == 1:
        return command(job.cluster.python, *job.training)
    return command(
        job.cluster.python, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={job.gpus_per_node}", *job.cluster.options, "-m", "--",
        *job.training[1:],
    )  # fmt: skip
