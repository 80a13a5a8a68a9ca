"""Who am I: the rank of this process among all, read once from whatever launched it.

Every launcher tells its processes apart in its own words. `join` translates them into one
`World`, which is passed down from there on, and into the five variables that torch and
DeepSpeed read. mpi4py is imported here and nowhere else.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass

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

    @property
    def is_main(self) -> bool:
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


def join(env: MutableMapping[str, str] = os.environ, *, expected_size: int | None = None) -> World:
    """The `World` of this process; sets torch's variables in `env`.

    Understands torchrun and `deepspeed` (RANK ...), `srun` (SLURM_PROCID ...), `mpirun` of Open
    MPI or MPICH (through mpi4py), and a process on its own.

    Raises:
        ValueError: fewer or more processes came up than `expected_size`. Launchers that fail to
            find each other start every rank as a world of one; all would write the same run.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _from_torch(env)
    elif "OMPI_COMM_WORLD_RANK" not in env and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        # Inside a Slurm job mpirun may start its own daemons by srun: those are no ranks of ours.
        world = _from_slurm(env)
    elif any(name in env for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")):
        world = _from_mpi(env)
    else:
        world = World(port=_free_port())
    if expected_size is not None and world.size != expected_size:
        raise ValueError(
            f"{world.size} processes came up ({world.launcher}), {expected_size} were asked for: "
            "the launcher's ranks did not find each other; check its --mpi or --nnodes options"
        )
    env.update(world.environment())
    return world


def mpi_executor() -> Executor:
    """Runs jobs on the other ranks of `mpirun -n N python -m mpi4py.futures -m ...`.

    Raises:
        ValueError: there are no other ranks to work.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPIPoolExecutor

    if MPI.COMM_WORLD.size < 2:
        raise ValueError("--mpi needs `mpirun -n N python -m mpi4py.futures -m ...`, N at least 2")
    return MPIPoolExecutor()


def _from_torch(env: Mapping[str, str]) -> World:
    return World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=int(env.get("MASTER_PORT", DEFAULT_PORT)),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment",
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    """One task per rank; they meet on the job's first host, at a port made from the job id."""
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    return World(
        rank=int(env["SLURM_PROCID"]),
        size=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=_tasks_here(env),
        address=env.get("MASTER_ADDR") or first_host(nodes),
        port=int(env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 20000),
        launcher="slurm",
    )


def _tasks_here(env: Mapping[str, str]) -> int:
    """This node's share of SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3"."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]


def first_host(nodelist: str) -> str:
    """The first host of a Slurm list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    host = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodelist)
    if host is None:
        raise ValueError(f"cannot read the Slurm host list {nodelist!r}")
    return "".join(part or "" for part in host.groups())


def _from_mpi(env: Mapping[str, str]) -> World:
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD
    here = everyone.Split_type(MPI.COMM_TYPE_SHARED, key=everyone.rank)
    meeting = everyone.bcast((socket.gethostname(), _free_port()) if everyone.rank == 0 else None)
    return World(
        rank=everyone.rank,
        size=everyone.size,
        local_rank=here.rank,
        local_size=here.size,
        address=env.get("MASTER_ADDR")
        or ("127.0.0.1" if here.size == everyone.size else meeting[0]),
        port=int(env.get("MASTER_PORT") or meeting[1]),
        launcher="mpi",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
