"""One version, printed by every command and recorded by every run."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from data.version import COMMIT, VERSION, commit, version
from launch import records
from trainer.run.directory import Run
from trainer.run.runstate import RunState

ROOT = Path(__file__).parent.parent


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_every_command_prints_version_and_commit() -> None:
    files = [file for name in ("trainer", "data", "launch") for file in (ROOT / name).rglob("*.py")]
    plain = [file for file in files if "ArgumentParser(" in file.read_text()]
    assert plain == [], "commands have the shared CommandParser"
    for name in ("trainer.config", "launch"):
        command = [sys.executable, "-m", name, "--version"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"adm-trainer {VERSION}") and commit() in said


def test_the_commit_is_that_of_the_checkout_or_of_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit(tmp_path) == ""
    (tmp_path / COMMIT).write_text("3eb1603\n")
    assert commit(tmp_path) == "3eb1603"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = commit(tmp_path)
    assert len(found) >= 7 and head.stdout.startswith(found)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit(tmp_path) == found, "a checkout of another user"
    with monkeypatch.context() as outside:
        for name, place in (("GIT_DIR", ROOT / ".git"), ("GIT_WORK_TREE", ROOT)):
            outside.setenv(name, str(place))
        assert commit(tmp_path) == found, "of another checkout, as in a hook"
    (tmp_path / COMMIT).write_text("changed\n")
    assert commit(tmp_path) == f"{found}-dirty"


def test_the_copy_of_the_code_that_a_job_runs_names_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CODE", ("launch",))
    records._copy_code(tmp_path / "code")
    assert commit(tmp_path / "code") == commit()


def test_a_run_records_the_version(tmp_path: Path) -> None:
    with Run(tmp_path).claimed():
        state = RunState.read(tmp_path)
    assert state is not None and state.version == version()
