"""Who am I: the rank of this process among all, read once from whatever launched it.

Every launcher tells its processes apart in its own words. `join` translates them into one
`World`, which is passed down from there on, and into the six variables that torch and
DeepSpeed read. In the trainer, mpi4py is imported here alone.
"""

import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.pool import no_mpi, other_mpi

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all processes of the run, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    launcher: str = "alone"
    #: Whether the launcher shows each process its own GPU alone, which then is number 0.
    own_gpu: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run."""
        return self.rank == 0

    def environment(self) -> dict[str, str]:
        """The variables by which torch.distributed and DeepSpeed find each other."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


# Open MPI's number of a rank on its machine. It counts socket by socket, as it places them.
_LOCAL = "OMPI_COMM_WORLD_LOCAL_RANK"
#: The variables of `World.environment`, and those of MPI's that a shell started as a rank has: a
#: rank believes them.
VARIABLES = (
    *World().environment(),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", _LOCAL),
    *("PMI_RANK", "PMI_SIZE", "PMIX_RANK"),
)
# A process's number and the number of all, in the words of torchrun, Open MPI, MPICH and Slurm.
_COUNTS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def join(env: MutableMapping[str, str] = os.environ, *, expected_size: int | None = None) -> World:
    """The `World` of this process; sets torch's variables in `env`.

    Understands torchrun and `deepspeed` (RANK ...), `srun` (SLURM_PROCID ...), `mpirun` of Open
    MPI or MPICH (through mpi4py), and a process on its own.

    Raises:
        ValueError: fewer or more processes came up than `expected_size`. Launchers that fail to
            find each other start every rank as a world of one; all would write the same run.
            Or a Slurm job of several tasks started this process without srun.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _from_torch(env)
    elif _is_task(env):
        world = _from_slurm(env)
    elif any(name in env for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")):
        world = _from_mpi(env)
    else:
        if expected_size != 1:
            _check_alone(env)
        world = World(port=_free_port())
    if expected_size is None and world.size == 1:
        expected_size = launched(env)[1]
    if expected_size is not None and world.size != expected_size:
        raise ValueError(
            f"{world.size} processes came up ({world.launcher}), {expected_size} were asked for: "
            "the launcher's ranks did not find each other; check its --mpi or --nnodes options"
        )
    env.update(world.environment())
    if _LOCAL in env:  # DeepSpeed compares it; torchrun's ranks may inherit that of an mpirun
        env[_LOCAL] = env["LOCAL_RANK"]
    # Other launchers, inside of a job, hand one task's GPU on to all their ranks.
    tasks = "SLURM_PROCID" in env and world.launcher in ("slurm", "environment")
    own_gpu = tasks and "," not in env.get("CUDA_VISIBLE_DEVICES", ",")
    return replace(world, own_gpu=own_gpu)


def _is_task(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process as a rank.

    Inside a Slurm job mpirun's ranks inherit the numbers of a shell, or of the daemon that mpirun
    has started by srun: MPICH's own are others. Those of `srun --mpi=pmi2` are the same.
    """
    if "OMPI_COMM_WORLD_RANK" in env or not {"SLURM_STEP_ID", "SLURM_PROCID"} <= env.keys():
        return False
    same = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    return all(env.get(mpi) in (None, env.get(slurm)) for mpi, slurm in same)


def launched(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes of its launcher this is, without joining them; alone (0, 1)."""
    for name, count in _COUNTS:
        if name in env and count in env:
            return _number(env, name), _number(env, count, least=1)
    return 0, 1


def _check_alone(env: Mapping[str, str]) -> None:
    """Refuse to be the only rank of a Slurm job that asked for several."""
    tasks = int(env.get("SLURM_NTASKS") or 1)
    if tasks > 1:
        raise ValueError(
            f"job {env.get('SLURM_JOB_ID')} of Slurm has {tasks} tasks, but this process was "
            "started without srun and would be its only rank: start it with `srun`; for one rank, "
            "with `srun -n1` or --ranks 1"
        )


def is_main_process() -> bool:
    """Whether this process is rank 0, also where joining the world has failed."""
    return os.environ.get("RANK", "0") == "0"


def host_name() -> str:
    """This machine's name. In a step of Slurm's that of the node, by which Slurm excludes it."""
    node = os.environ.get("SLURMD_NODENAME") if _is_task(os.environ) else None
    return node or socket.gethostname()


def process_name() -> str:
    """Such as "rank 3 on gpu07"."""
    return f"rank {os.environ.get('RANK', '0')} on {host_name()}"


def step_hosts() -> list[str]:
    """The host of each rank of this Slurm step, in order; none under another launcher."""
    nodes = hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    counts = _tasks_by_node(os.environ)
    return [host for host, count in zip(nodes, counts, strict=False) for _ in range(count)]


def scheduler_job() -> tuple[str | None, int]:
    """Slurm's id of the job of this process, under any launcher, and how often it was restarted."""
    return os.environ.get("SLURM_JOB_ID") or None, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _from_torch(env: Mapping[str, str]) -> World:
    return World(
        rank=_number(env, "RANK"),
        size=_number(env, "WORLD_SIZE", least=1),
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=_ranks_here(env),
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=_port(env) or DEFAULT_PORT,
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment",
    )


def _number(env: Mapping[str, str], name: str, *, least: int = 0, most: int = 2**31) -> int:
    """The number that a variable holds, or `least`; ValueError where it holds anything else."""
    found = env.get(name, str(least))
    if not found.isdecimal() or not least <= int(found) <= most:
        raise ValueError(
            f"{name} = {found!r}, a variable of the environment: must be an integer from {least}"
            f"{'' if most == 2**31 else f' to {most}'}; launchers set it: `unset` your own"
        )
    return int(found)


def _port(env: Mapping[str, str]) -> int | None:
    """The port that MASTER_PORT names, if it names one."""
    return _number(env, "MASTER_PORT", least=1, most=65535) if env.get("MASTER_PORT") else None


def _ranks_here(env: Mapping[str, str]) -> int:
    """The ranks on this machine: torchrun and `deepspeed` tell, enroot leaves it to Slurm."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in env:
            return _number(env, name, least=1)
    return _tasks_here(env)


def _from_slurm(env: Mapping[str, str]) -> World:
    """One task per rank; they meet on the step's first host."""
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    return World(
        rank=int(env["SLURM_PROCID"]),
        size=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=_tasks_here(env),
        address=env.get("MASTER_ADDR") or _host_file(env) or hosts(nodes)[0],
        port=_port(env) or _slurm_port(env),
        launcher="slurm",
    )


def _host_file(env: Mapping[str, str]) -> str:
    """The first host of the file that orders a step's tasks, if one does (`srun -m arbitrary`)."""
    file = env.get("SLURM_HOSTFILE")
    if not file or env.get("SLURM_DISTRIBUTION") != "arbitrary":
        return ""
    try:
        return Path(file).read_text().split()[0]
    except (OSError, IndexError) as error:
        raise ValueError(
            f"SLURM_HOSTFILE = {file!r} cannot be read ({error}), and orders the ranks: put it on "
            "a shared disk, or set MASTER_ADDR to its first host"
        ) from None


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port of this step's own: several `srun` of one job may train side by side."""
    # Far from those of the jobs that are numbered next.
    return 20000 + (int(env["SLURM_JOB_ID"]) + 997 * int(env["SLURM_STEP_ID"])) % 10000


def _tasks_here(env: Mapping[str, str]) -> int:
    """The tasks of this node."""
    return _tasks_by_node(env)[int(env.get("SLURM_NODEID", "0"))]


def _tasks_by_node(env: Mapping[str, str]) -> list[int]:
    """SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3", written out."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def hosts(nodelist: str) -> list[str]:
    """The hosts of a Slurm list: "gpu[07-09,12],cpu1" -> gpu07, gpu08, gpu09, gpu12, cpu1."""
    found: list[str] = []
    for prefix, inside, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist):
        for span in inside.split(",") if inside else [""]:
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            found += [
                prefix if n is None else f"{prefix}{n:0{len(first)}d}{suffix}" for n in numbers
            ]
    return found


def _from_mpi(env: Mapping[str, str]) -> World:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(no_mpi(error)) from None
    everyone = MPI.COMM_WORLD
    if everyone.size == 1 and (count := launched(env)[1]) > 1:
        unlike = other_mpi(MPI.Get_library_version())
        raise ValueError(f"1 processes came up (mpi), {count} were asked for: {unlike}")
    here = everyone.Split_type(MPI.COMM_TYPE_SHARED, key=everyone.rank)
    meeting = everyone.bcast((socket.gethostname(), _free_port()) if everyone.rank == 0 else None)
    return World(
        rank=everyone.rank,
        size=everyone.size,
        local_rank=_number(env, _LOCAL) if _LOCAL in env else here.rank,
        local_size=here.size,
        address=env.get("MASTER_ADDR")
        or ("127.0.0.1" if here.size == everyone.size else meeting[0]),
        port=_port(env) or meeting[1],
        launcher="mpi",
    )


def leave_mpi() -> None:
    """Finish MPI where it has started this process. All ranks do."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
