"""Site settings added to every job: a TOML file of the user's, read into `Cluster`.

`launch/clusters/` has examples. A setting that is absent from the file is absent from the job, so
that the site's own default applies.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from data.config import naming
from data.progress import duration
from trainer.adm.config import check
from trainer.config import settings

Launcher = Literal["slurm", "mpirun", "deepspeed", "torchrun", "alone", "kubernetes"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
# Slurm's notations of a time limit: minutes, with hours or days before and seconds behind.
_TIMES = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def limit(time: str) -> float:
    """A time limit of Slurm's in seconds.

    Raises:
        ValueError: it is not in one of Slurm's notations.
    """
    found = [match for form in _TIMES if (match := re.fullmatch(form, time))]
    is_unlimited = time.upper() in ("UNLIMITED", "INFINITE")
    notations = 'such as "90" (minutes), "24:00:00", "2-00:00:00" or "UNLIMITED"'
    check(is_unlimited or bool(found), "slurm.time", time, notations)
    parts = found[0].groupdict() if found else {}
    seconds = sum(_SECONDS[unit] * int(count or 0) for unit, count in parts.items())
    return math.ceil(seconds / 60) * 60 or math.inf  # Slurm counts whole minutes; 0 is no limit


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Options of `sbatch` besides nodes and tasks."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    #: Slurm's own notation, such as "24:00:00" or "2-00:00:00"; a plain number is minutes.
    time: str | None = None
    cpus_per_task: int | None = None
    #: Memory per node, such as "0" (all) or "200G".
    memory: str | None = None
    #: The generic resource that counts GPUs, such as "gpu" or "gpu:h100". "none" requests none, for
    #: sites that give whole nodes.
    gres: str = "gpu"
    #: The option of sbatch that requests them.
    gpus_flag: Literal["gres", "gpus-per-node", "gpus-per-task"] = "gres"
    #: Whether a job that saved puts itself back into the queue. If not, it submits another job that
    #: begins when it has ended; sites may forbid the one or the other.
    requeue: bool = True
    #: Further options of sbatch, such as "--exclusive".
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in self.options:
            is_one = option.startswith("--") and "\n" not in option
            check(is_one, "slurm.options", option, 'such as "--name=value"')
        for name in ("partition", "account", "qos", "constraint", "reservation", "memory"):
            value = getattr(self, name)
            # sbatch takes what follows a space for an option or a comment, unless it is quoted.
            is_word = re.fullmatch(r"\S*|[^\n]*[\"'][^\n]*", value or "") is not None
            check(is_word, f"slurm.{name}", value, "without spaces")
        is_gres = re.fullmatch(r"[\w/.-]+(:(?!\d+$)[\w.-]+)?", self.gres) is not None
        expected = 'such as "gpu" or "gpu:h100", without a number, or "none" to leave it out'
        check(is_gres, "slurm.gres", self.gres, expected)
        self.limit()

    def limit(self) -> float | None:
        """The time limit in seconds; infinite if there is none, None if the site decides.

        Raises:
            ValueError: it is not in Slurm's notation.
        """
        # The last line of a script counts, and `options` come after `time`.
        found = (re.fullmatch(r"--time[= ]+(.*)", option) for option in self.options)
        times = [self.time, *(match[1] for match in found if match)]
        given = [time for time in times if time is not None]
        return limit(given[-1]) if given else None


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image that the ranks run in. The run directory must have the same path inside."""

    kind: Literal["pyxis", "apptainer"]
    image: str
    #: Such as "/scratch:/scratch".
    mounts: tuple[str, ...] = ()

    def srun_options(self, *, directory: Path) -> tuple[str, ...]:
        """Options of srun that start the ranks inside, in `directory`."""
        if self.kind == "apptainer":
            return ()
        mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        workdir = f"--container-workdir={directory}"
        return (f"--container-image={self.image}", *mounts, workdir)

    def command(self, *, directory: Path, environment: Mapping[str, str]) -> tuple[str, ...]:
        """The words before a command that make it run inside, in `directory`.

        A variable that the image sets would count, not ours.
        """
        env = ("env", *(f"{name}={value}" for name, value in environment.items()))
        if self.kind == "pyxis":
            return env
        mounts = (word for mount in self.mounts for word in ("--bind", mount))
        return ("apptainer", "exec", "--nv", *mounts, "--pwd", str(directory), self.image, *env)


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """The pods' image, and the volume that holds the run directory."""

    image: str
    #: A persistent volume claim, mounted at `mount` in every pod and here.
    claim: str
    mount: str
    namespace: str = "default"
    #: PyTorchJob of the training operator, or TrainJob of Kubeflow Trainer (version 2).
    kind: Literal["PyTorchJob", "TrainJob"] = "PyTorchJob"
    #: Further limits of a pod, such as "rdma/hca" = "8" or "memory" = "800Gi".
    resources: Mapping[str, str] = field(default_factory=dict)
    #: The size of /dev/shm, such as "64Gi". Absent: half of the node's memory.
    shared_memory: str | None = None
    #: Taints of nodes that the pods may run on, such as "gpu=h100:NoSchedule" or "gpu:NoSchedule".
    tolerations: tuple[str, ...] = ()
    #: How often Kubeflow restarts a job before it marks it as failed.
    restarts: int = 20

    def __post_init__(self) -> None:
        for taint in self.tolerations:
            is_taint = re.fullmatch(
                r"[\w./-]+(=[\w.-]+)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", taint
            )
            check(is_taint is not None, "kubernetes.tolerations", taint, 'such as "gpu:NoSchedule"')


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How a site starts jobs."""

    launcher: Launcher = "slurm"
    #: The interpreter on the nodes, by absolute path.
    python: str = sys.executable
    #: Shell lines that run first, such as "module load cuda". They see `environment`.
    setup: tuple[str, ...] = ()
    #: Variables of the setup and of every rank; what the setup changes of them does not last.
    environment: Mapping[str, str] = field(default_factory=dict)
    #: The machines, for launchers that are not schedulers.
    hosts: tuple[str, ...] = ()
    mpi: Literal["openmpi", "mpich"] = "openmpi"
    #: Further options of mpirun, `deepspeed` or torchrun.
    options: tuple[str, ...] = ()
    #: Where the ranks of `deepspeed` and torchrun meet. Absent: a port made from the run's path.
    port: int | None = None
    #: Train on CPUs. Otherwise every node must show its GPUs, or the job is refused.
    cpu: bool = False
    #: Seconds after which a lost or hung rank ends the job.
    patience: int = 600
    #: Seconds that the ranks have to save: under Slurm before the time limit, under torchrun and
    #: Kubernetes between TERM and KILL.
    seconds_to_save: int = 300
    slurm: Slurm = Slurm()
    container: Container | None = None
    kubernetes: Kubernetes | None = None

    def __post_init__(self) -> None:
        check(self.patience >= 10, "patience", self.patience, "at least 10 seconds")
        seconds = self.seconds_to_save
        check(1 <= seconds <= 65535, "seconds_to_save", seconds, "from 1 to 65535")
        if self.launcher == "slurm" and (time := self.slurm.limit()) is not None:
            self._check_time(time)
        for name in self.environment:
            is_name = re.fullmatch(r"[A-Za-z_]\w*", name) is not None
            check(is_name, "environment", name, "a table whose keys are names of variables")
        self._check_words()
        self._check_machines()
        if self.launcher == "kubernetes" and self.kubernetes is None:
            raise ValueError(
                'launcher = "kubernetes": add a section [kubernetes] with image, claim and mount'
            )
        start = "remove the section, and start the launcher inside the container instead"
        runs = self.container is None or self.launcher == "slurm"
        check(runs, "launcher", self.launcher, f'"slurm" with a section [container]; {start}')

    def _check_words(self) -> None:
        """Refuse what a shell would expand: every word but those of `setup` is taken literally."""
        container = self.container
        words = {
            "python": [self.python],
            "options": self.options,
            "slurm.options": self.slurm.options,
            "container": [container.image, *container.mounts] if container else [],
            **{f"environment.{name}": [value] for name, value in self.environment.items()},
        }
        whole = "without variables and ~user, which no shell expands here: write the whole value"
        for name, values in words.items():
            for value in values:
                is_plain = re.search(r"\$[\w{(]|`|^~", value) is None
                check(is_plain, name, value, f"{whole}, or export it in `setup`")

    def _check_machines(self) -> None:
        """Refuse what no machine, port or interpreter is called."""
        names = [host.rpartition("@")[2] for host in self.hosts]
        for host in self.hosts:
            is_name = re.fullmatch(r"(\w[\w.-]*@)?[A-Za-z0-9][\w.-]*", host) is not None
            check(is_name, "hosts", host, 'names of machines, such as "n1" or "me@n1"')
            once = names.count(host.rpartition("@")[2]) == 1
            check(once, "hosts", host, "in the list once")
        check(self.port is None or 1 <= self.port <= 65535, "port", self.port, "from 1 to 65535")
        is_program = len(Path(self.python).name.split()) == 1
        check(is_program, "python", self.python, "one program, without options")

    def _check_time(self, time: float) -> None:
        """Refuse a time limit that the ranks would only use to save."""
        if time <= self.seconds_to_save:
            raise ValueError(
                f"slurm.time is {duration(time)}: must be above seconds_to_save, "
                f"{duration(self.seconds_to_save)}, or no time is left to train; raise the former "
                "or reduce the latter"
            )


def load(path: Path) -> Cluster:
    """Read a cluster file; ValueError where it is missing, no TOML, or a setting is wrong."""
    if path.is_dir() or not path.exists():
        place = f"{Path(__file__).parent / 'clusters'}"
        raise ValueError(
            f"--cluster: cannot read {path}: no such file; copy one of {place}, or leave --cluster "
            "out for this machine"
        )
    table = settings.read(path)
    with naming(f"{path}"):
        _lift_seconds_to_save(table)
        places = ("python", "environment", "container")
        table |= {k: _expand_home(v) for k, v in table.items() if k in places}
        cluster: Cluster = settings.build(Cluster, table)
    return cluster


def _lift_seconds_to_save(table: settings.Table) -> None:
    """Accept `seconds_to_save` in [slurm], where cluster files had it at first."""
    section = table.get("slurm")
    if not isinstance(section, dict) or "seconds_to_save" not in section:
        return
    earlier = section.pop("seconds_to_save")
    seconds = table.setdefault("seconds_to_save", earlier)
    same = f"equal to seconds_to_save = {seconds!r}, or absent"
    check(earlier == seconds, "slurm.seconds_to_save", earlier, same)


def _expand_home(value: object) -> object:
    """The value with ~ replaced in its strings, where a shell does: at the beginning or after :."""
    if isinstance(value, str):
        try:
            return re.sub(r"(?:^|(?<=:))~(?=/)", lambda _: str(Path.home()), value)
        except RuntimeError:  # a container may have no name for its user
            raise ValueError(f"{value}: HOME is not set: write whole paths") from None
    if isinstance(value, list):
        return [_expand_home(v) for v in value]
    if isinstance(value, dict):
        return {k: _expand_home(v) for k, v in value.items()}
    return value
