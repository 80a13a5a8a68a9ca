"""The commands of the pages run, in a place where everything is small: `make docs-check`.

What needs a cluster is printed with `--dry-run`, and tests/test_launch_readme.py runs it on a real
one. What needs a GPU machine, a registry or a browser is read by its parser in tests/test_docs.py.
"""

import pytest

from tests.support.pages import PAGES, ROOT, Command
from tests.support.walkthrough import Walkthrough
from trainer import plan

#: The beginning of what is not run here, and what does run it.
ELSEWHERE = {
    "make": "CI runs each verb",
    "pip": "make runs it",
    "srun": "tests/test_launch_readme.py",
    "cp": "tests/test_launch_readme.py",
    "tensorboard": "tests/test_launch_readme.py",
    "docker": "a registry", "apptainer": "a registry", "kubectl": "a cluster",
    "python -m trainer.ablate": "tests/test_ablate.py",
    "python -m bench": "tests/test_bench.py",
    "python -m launch stop": "tests/test_launch_readme.py",
    "python -m launch status": "tests/test_launch_readme.py",
    "python -m launch check": "tests/test_launch_readme.py",
}  # fmt: skip
COMMANDS = [
    command
    for page in PAGES
    for command in page.commands
    if not command.text.startswith(tuple(ELSEWHERE))
]

pytestmark = pytest.mark.docs


@pytest.fixture(scope="session")
def walkthrough(tmp_path_factory: pytest.TempPathFactory) -> Walkthrough:
    return Walkthrough(tmp_path_factory.mktemp("walkthrough"))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_the_pages_runs(walkthrough: Walkthrough, command: Command) -> None:
    walkthrough.run(command)


def test_the_table_of_presets_is_the_planner_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["all", "--gpus", "8"]) == 0
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()
