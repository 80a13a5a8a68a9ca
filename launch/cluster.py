"""What a site wants said with every job: a small TOML file of the user's, read into `Cluster`.

`launch/clusters/` has examples. Whatever a file leaves out is left out of the job too, so that
the site's own defaults hold.
"""

import dataclasses
import re
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Launcher = Literal["slurm", "mpirun", "deepspeed", "torchrun", "alone", "kubernetes"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What `sbatch` is asked for besides nodes and tasks."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    #: Slurm's own notation, such as "24:00:00" or "2-00:00:00".
    time: str | None = None
    cpus_per_task: int | None = None
    #: Memory per node, such as "0" (all) or "200G".
    memory: str | None = None
    #: The generic resource that counts GPUs, such as "gpu" or "gpu:h100".
    gres: str = "gpu"
    #: How long before the time limit the ranks are told to save and leave.
    seconds_to_save: int = 300
    #: Further options of sbatch, such as "--exclusive".
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.seconds_to_save <= 65535:
            raise ValueError(
                f"slurm.seconds_to_save = {self.seconds_to_save}: it must be from 1 to 65535"
            )
        for option in self.options:
            if not option.startswith("--"):
                raise ValueError(f'slurm.options: {option!r}: write it as "--name=value"')


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image that the ranks run in. The run directory must be seen at the same path inside."""

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

    def command(self, *, directory: Path) -> tuple[str, ...]:
        """What stands before the command that runs inside, in `directory`."""
        if self.kind == "pyxis":
            return ()
        mounts = (word for mount in self.mounts for word in ("--bind", mount))
        return ("apptainer", "exec", "--nv", *mounts, "--pwd", str(directory), self.image)


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """Where the pods get their image, and the volume that the run directory is on."""

    image: str
    #: A persistent volume claim, mounted at `mount` in every pod and here.
    claim: str
    mount: str
    namespace: str = "default"
    #: Kubeflow starts a job again this often before it calls it failed.
    restarts: int = 20


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How jobs are started at a site."""

    launcher: Launcher = "slurm"
    #: The interpreter on the nodes, by absolute path.
    python: str = sys.executable
    #: Lines of shell ahead of everything, such as "module load cuda".
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    #: The machines, where no scheduler names them.
    hosts: tuple[str, ...] = ()
    mpi: Literal["openmpi", "mpich"] = "openmpi"
    #: Further options of mpirun, `deepspeed` or torchrun.
    options: tuple[str, ...] = ()
    port: int = 29500
    #: Seconds after which a rank that is lost or hung ends the job.
    patience: int = 600
    slurm: Slurm = Slurm()
    container: Container | None = None
    kubernetes: Kubernetes | None = None

    def __post_init__(self) -> None:
        if self.patience < 10:
            raise ValueError(f"patience = {self.patience}: it must be at least 10 seconds")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"environment.{name}: it must be a name of a variable")
        if self.launcher == "kubernetes" and self.kubernetes is None:
            raise ValueError(
                'launcher = "kubernetes": it needs a section [kubernetes] with image, claim, mount'
            )
        if self.container is not None and self.launcher != "slurm":
            raise ValueError(
                f"launcher = {self.launcher!r}: [container] goes with slurm alone; start the "
                "launcher inside of the container instead, and remove the section"
            )


def load(path: Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ValueError: it is missing or no TOML, or a setting is unknown or of another type.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the cluster file {path}: {error}") from None
    try:
        return typing.cast(Cluster, _build(Cluster, table, where=""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _build(kind: Any, table: Mapping[str, Any], *, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if unknown := [key for key in table if key not in hints]:
        raise ValueError(f"unknown setting {where}{unknown[0]}; there are: {', '.join(hints)}")
    for required in dataclasses.fields(kind):
        absent = required.default is required.default_factory is dataclasses.MISSING
        if absent and required.name not in table:
            raise ValueError(f"setting {where}{required.name} is missing")
    return kind(**{k: _convert(hints[k], v, name=f"{where}{k}") for k, v in table.items()})


def _convert(hint: Any, value: Any, *, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = get_args(hint)[0]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, where=f"{name}.")
    if typing.get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"{name} = {value!r}: it must be one of {', '.join(get_args(hint))}")
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(str, item, name=f"{name}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is Mapping and isinstance(value, dict):
        return {key: _convert(str, item, name=f"{name}.{key}") for key, item in value.items()}
    if type(value) is not hint:
        raise ValueError(f"{name} = {value!r}: it must be of type {_said(hint)}")
    return value


def _said(hint: Any) -> str:
    """A type as a TOML file's writer knows it."""
    names = {str: "string", int: "integer", tuple: "list of strings", Mapping: "table of strings"}
    return names.get(typing.get_origin(hint) or hint, "table")


def quoted(words: typing.Iterable[object]) -> str:
    """Words as the shell reads them back."""
    return shlex.join(str(word) for word in words)
