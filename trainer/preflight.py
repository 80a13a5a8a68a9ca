"""What this machine has for training, and what is missing.

  python -m trainer.preflight

Each line is `ok`, `warning`, `missing` or `optional`, with the way out. Needs Python alone, no run
and no cluster; `python -m launch check` checks an allocation. Exit status: 78 where something is
missing without which training cannot run, else 0.
"""

import sys

# Ahead of all other imports, which an older Python may not have.
if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"missing   Python      {version} ({sys.executable}): must be 3.11 or newer; load such a "
        "module, or name the interpreter, such as `python3.11 -m trainer.preflight`"
    )
    sys.exit(78)

import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data import files
from data.exits import REFUSED, CommandParser, reported
from data.version import version as code_version
from trainer.engine import caches
from trainer.planning import machine
from trainer.planning.machine import Finding, Torch

_ROOT = Path(__file__).resolve().parent.parent
# Seconds after which the import of a library counts as hung, as in the driver of a broken GPU.
_PATIENCE = 600.0
_MIB, _GIB = 2**20, 2**30

# The code that tries each library, in a process of its own; the last line printed is its answer.
_TRIES = {
    "torch": "from trainer import preflight; preflight.print_torch()",
    "deepspeed": "import trainer.engine.zero; from trainer.engine import operators; "
    "operators.check_accelerator()",
    "MPI": "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().splitlines()[0].partition(',')[0])",
}
_LAUNCHERS = ("torchrun", "srun", "mpirun", "deepspeed", "ssh", "pdsh", "kubectl")


def print_torch() -> None:
    """Print as JSON what torch says of itself. Run in a process of its own, which may crash."""
    import warnings

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        import torch

        build = "CPU"
        if torch.version.hip is not None:
            build = f"ROCm {torch.version.hip.partition('-')[0]}"
        elif torch.version.cuda is not None:
            build = f"CUDA {torch.version.cuda}"
        sees = torch.cuda.is_available()
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() * sees)]
    nccl = ""
    if sees and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    said = "; ".join(str(each.message).splitlines()[0] for each in warned)
    found = Torch(version=torch.__version__, build=build, gpus=gpus, warned=said, nccl=nccl)
    print(json.dumps(asdict(found)))


class _Try:
    """A library that is tried in a process of its own, beside the others."""

    def __init__(self, name: str) -> None:
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TRIES[name]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )

    def answer(self) -> tuple[str, str]:
        """The last line that it printed, and why it failed or ""."""
        try:
            out, err = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "", f"no answer in {_PATIENCE:.0f} s"
        status = self._process.returncode
        if status < 0:
            return "", f"its process was ended by {signal.Signals(-status).name}"
        lines = (out if status == 0 else err).strip().splitlines() or [""]
        return (lines[-1], "") if status == 0 else ("", lines[-1])


def findings() -> Iterator[tuple[str, Finding]]:
    """The findings on this machine, by name, in the order in which to correct them."""
    tries = {name: _Try(name) for name in _TRIES}
    yield "Python", ("ok", f"{platform.python_version()} ({sys.executable})")
    requirements, extras = _requirements()
    yield "packages", machine.packages(_unmet(requirements), installed=len(requirements))
    devices = _devices()
    text, error = tries["torch"].answer()
    torch = Torch(error=error) if error else Torch(**json.loads(text))
    yield "torch", machine.torch(torch, devices=devices)
    yield "GPUs", machine.gpus(torch, devices=devices)
    yield "NCCL", machine.collectives(torch)
    _, error = tries["deepspeed"].answer()
    yield "deepspeed", machine.deepspeed(error, version=_installed("deepspeed"))
    yield from _building(torch)
    launchers = [name for name in _LAUNCHERS if _which(name)]
    library, error = tries["MPI"].answer()
    yield "MPI", machine.mpi(library, error=error, launchers=launchers)
    yield "launchers", machine.launchers(launchers)
    yield "host name", machine.host_name(socket.gethostname(), fault=_name_fault())
    yield from _resources(on_gpus=bool(torch.gpus))
    for name, wanted in extras.items():
        yield f"[{name}]", machine.extra(name, _unmet(wanted))


def _building(torch: Torch) -> Iterator[tuple[str, Finding]]:
    """The tools that compile operators and kernels, and where the results are kept."""
    on_gpus, command = bool(torch.gpus), os.environ.get("CXX", "c++")
    yield "compiler", machine.compiler(_compiler_fault(command), command=command, on_gpus=on_gpus)
    yield "ninja", machine.ninja(_which("ninja"), on_gpus=on_gpus)
    for variable in (caches.TRITON, caches.INDUCTOR) if on_gpus else (caches.OPERATORS,):
        where = str(caches.directory(variable))
        name = "kernels" if on_gpus else "operators"
        fault = caches.fault(variable) or caches.made_fault()
        yield name, machine.kept(where, fault=fault, on_gpus=on_gpus)
    yield "nvcc", machine.nvcc(_nvcc_release(), build=torch.build)


def _resources(*, on_gpus: bool) -> Iterator[tuple[str, Finding]]:
    """Shared memory, disks and open files."""
    memory, total = Path("/dev/shm"), 0.0
    free: float | None = None
    if not files.write_fault(memory) and memory.is_dir():
        usage = shutil.disk_usage(memory)
        free, total = usage.free / _MIB, usage.total / _MIB
    yield "/dev/shm", machine.shared_memory(free, total=total, on_gpus=on_gpus)
    for place in dict.fromkeys((os.getcwd(), tempfile.gettempdir())):
        yield "disk", machine.disk(shutil.disk_usage(place).free / _GIB, place=place)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = float("inf") if hard == resource.RLIM_INFINITY else float(hard)
    yield "open files", machine.open_files(most)


def _name_fault() -> str:
    """Why this machine's own name has no address, or ""."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The required and optional packages of pyproject.toml; none in a job's copy of the code."""
    file = _ROOT / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"] if file.exists() else {}
    return project.get("dependencies", []), project.get("optional-dependencies", {})


def _unmet(requirements: Sequence[str]) -> list[str]:
    """The requirements that are not met: the name, with what is wrong with its version if any."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then DeepSpeed is missing too, and no version matters yet
        names = [re.split(r"[^\w.-]", text)[0] for text in requirements]
        return [name for name in names if not _installed(name)]
    faults = []
    for wanted in map(Requirement, requirements):
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        found = _installed(wanted.name)
        if not found:
            faults.append(wanted.name)
        elif not wanted.specifier.contains(found, prereleases=True):
            faults.append(f"{wanted.name} {found} (must be {wanted.specifier})")
    return faults


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _which(name: str) -> str | None:
    """A program in PATH, or beside the interpreter of an environment that is not activated."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), beside]))


def _devices() -> str:
    """The kind of GPUs whose driver is loaded; "" where the user hides them."""
    hidden = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    if any(os.environ.get(name) in ("", "-1") for name in hidden):
        return ""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/nvidia0").exists():
        return "NVIDIA"
    return "AMD" if Path("/dev/kfd").exists() else ""


def _compiler_fault(command: str) -> str:
    """Why a library like DeepSpeed's operator cannot be compiled and linked, or ""."""
    try:
        compiler = shlex.split(command)
    except ValueError as error:
        return f"CXX = {command!r}: {error}"
    if not compiler:  # torch would compile by no command
        return f"CXX = {command!r} names no compiler: unset it"
    if shutil.which(compiler[0]) is None:
        return f"no {compiler[0]} in PATH"
    source = "#include <Python.h>\n#include <omp.h>\n#include <vector>\n"
    headers = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as directory:
        options = ["-shared", "-fPIC", "-fopenmp", f"-I{headers}", "-x", "c++", "-"]
        words = [*compiler, *options, "-o", f"{directory}/probe.so"]
        tried = subprocess.run(words, input=source, capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return ""
    lines = [line for line in tried.stderr.splitlines() if "error" in line]
    return f"{compiler[0]} fails: {(lines or ['no message'])[0].strip()}"


def _nvcc_release() -> str | None:
    """The release of the CUDA toolkit that DeepSpeed would find, such as "12.6"."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        said = subprocess.run([found, "-V"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    CommandParser(prog="python -m trainer.preflight", description=__doc__).parse_args(argv)
    return reported(_check)


def _check() -> int:
    print(f"adm-trainer {code_version()} on {platform.platform()}", flush=True)
    missing = []
    for name, (state, said) in findings():
        print(f"{state:8}  {name:10}  {said}", flush=True)
        missing += [name] * (state == "missing")
    if missing:
        print(f"training cannot run here; missing: {', '.join(missing)}")
        return REFUSED
    print("training can run here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
