"""The house stands as drawn: import arrows point one way, and each heavy library has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("launch", "data", "trainer")

#: launch <- data <- trainer; and the paper's mathematics stand alone.
MAY_IMPORT = {
    "launch": {"launch"},
    "data": {"launch", "data"},
    "trainer": {"launch", "data", "trainer"},
}

DOORS = {
    "deepspeed": "trainer/engine.py",
    "webdataset": "data/fetch.py",
    "mpi4py": "launch/world.py",
    "tensorboard": "trainer/metrics.py",
}


def imports(file: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = {
    file.relative_to(ROOT).as_posix(): imports(file)
    for package in HOUSE
    for file in (ROOT / package).rglob("*.py")
}


@pytest.mark.parametrize("package", HOUSE)
def test_imports_point_one_way(package: str) -> None:
    for file, names in FILES.items():
        if file.startswith(f"{package}/"):
            ours = {name.split(".")[0] for name in names} & set(HOUSE)
            assert ours <= MAY_IMPORT[package], file


def test_the_mathematics_know_neither_the_house_nor_the_cluster() -> None:
    for file, names in FILES.items():
        if file.startswith("trainer/adm/"):
            assert all(name.startswith("trainer.adm") for name in names
                       if name.split(".")[0] in HOUSE), file  # fmt: skip
            assert not any("distributed" in name for name in names), file


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    through = {file for file, names in FILES.items() if any(library in name for name in names)}
    assert through == {DOORS[library]}


def test_launch_works_where_there_is_no_torch() -> None:
    """On a login node, that is; `check` alone runs on the nodes."""
    names = ", ".join(
        f"'{file.removesuffix('.py').replace('/', '.')}'"
        for file in FILES
        if file.startswith("launch/") and file != "launch/check.py"
    )
    code = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, deepspeed=None, numpy=None)\n"
        f"for name in ({names},): importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
