"""The structure: import arrows point one way, heavy libraries stay in one module each."""

import ast
import graphlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: launch -> trainer -> data: a package imports itself and those after it.
PACKAGES = ("launch", "trainer", "data")

#: The only modules that import a heavy library.
ONLY_IN = {
    "deepspeed": {"trainer/engine/zero.py"},
    "webdataset": {"data/stores.py"},
    "mpi4py": {"trainer/ranks/world.py", "data/pack.py"},
    "tensorboard": {"trainer/watch/tensorboard.py"},
    "wandb": {"trainer/watch/wandb.py"},
    "matplotlib": {"trainer/evaluation/plots.py"},
    "triton": {"trainer/adm/fused.py", "trainer/adm/kernels.py"},
}
#: The functions of a GPU.
KERNELS = ROOT / "trainer" / "adm" / "kernels.py"
#: What a login node runs, which has neither torch nor numpy.
PURE = (
    "trainer.ablations.sets",
    "trainer.config.experiment",
    "trainer.config.sections",
    "trainer.config.settings",
    "trainer.config.ds_config",
    "trainer.run.origin",
    "trainer.run.runstate",
    "trainer.run.goodput",
    "trainer.run.history",
    "trainer.sampling.fit",
    "trainer.sampling.options",
    "data.config",
)


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
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    below = set(PACKAGES[PACKAGES.index(package) :])
    for file, names in FILES.items():
        if file.startswith(f"{package}/"):
            ours = {name.split(".")[0] for name in names} & set(PACKAGES)
            assert ours <= below, file


def test_the_mathematics_import_nothing_else_of_ours() -> None:
    for file, names in FILES.items():
        if file.startswith("trainer/adm/"):
            ours = [name for name in names if name.split(".")[0] in PACKAGES]
            assert all(name.startswith("trainer.adm") for name in ours), file
            assert not any("distributed" in name for name in names), file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_is_imported_in_one_place(library: str) -> None:
    found = {
        file
        for file, names in FILES.items()
        if any(library in name.split(".") for name in names if not name.startswith("trainer."))
    }
    assert found == ONLY_IN[library]


def test_a_login_node_needs_neither_torch_nor_numpy() -> None:
    launch = [f.removesuffix(".py").replace("/", ".") for f in FILES if f.startswith("launch/")]
    code = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, deepspeed=None, numpy=None)\n"
        f"for name in {(*launch, *PURE)}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters of every function in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if file == KERNELS and "_kernel" in [ast.unparse(each) for each in node.decorator_list]:
                count = 0  # addresses and sizes: a GPU's functions have no other parameters
            yield node.name, node.end_lineno - node.lineno + 1, count


def test_files_and_functions_stay_small() -> None:
    files = [file for file in ROOT.rglob("*.py") if ".venv" not in file.parts]
    lengths = {file: len(file.read_text().splitlines()) for file in files}
    assert [f"{file}: {length}" for file, length in lengths.items() if length > 300] == []
    ours = [file for file in files if file.relative_to(ROOT).parts[0] in PACKAGES]
    found = [(file, *function) for file in ours for function in functions(file)]
    assert [each for each in found if each[2] > 60 or each[3] > 9] == []
    assert statistics.median(lines for *_, lines, _ in found) <= 9


def test_nothing_reads_the_log() -> None:
    for file in FILES:
        text = (ROOT / file).read_text()
        code = [line for line in text.splitlines() if '"log.txt"' in line]
        assert not code or file == "trainer/run/directory.py", file
    for template in (ROOT / "launch" / "templates").iterdir():
        assert "log.txt" not in template.read_text()


@pytest.mark.parametrize("depth", [2, 3], ids=["room", "file"])
def test_none_imports_itself_by_a_detour(depth: int) -> None:
    modules = {tuple(file.removesuffix(".py").split("/")): names for file, names in FILES.items()}
    arrows: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, names in modules.items():
        found = {tuple(name.split(".")) for name in names}
        found = {name if name in modules else name[:-1] for name in found} & {*modules}
        arrows.setdefault(module[:depth], set()).update(name[:depth] for name in found)
    try:
        graphlib.TopologicalSorter({at: to - {at} for at, to in arrows.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join("/".join(each) for each in error.args[1]))
