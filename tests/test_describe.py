"""The page of settings is current, and says what every setting means."""

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch.cluster import Cluster
from trainer.config import describe
from trainer.config.experiment import Config


def test_the_page_of_settings_is_current() -> None:
    page = Path("docs/settings.md").read_text()
    assert page == "\n".join(describe.page()), (
        "python -m trainer.config.describe > docs/settings.md"
    )


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in describe.page() if line.startswith("| `")]
    assert len(rows) > 70
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []


def read_by(node: ast.AST) -> Iterator[str]:
    """The attributes that code reads, but for what only checks them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield child.attr
        name = child.name if isinstance(child, ast.FunctionDef) else ""
        if name != "__post_init__" and not name.startswith("_check"):
            yield from read_by(child)


def settings(kind: type) -> Iterator[tuple[str, str]]:
    """The names of a dataclass's settings, and of those within it, each with its class."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield kind.__name__, field.name
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                yield from settings(hint)


def test_every_setting_is_read() -> None:
    files = [file for part in ("data", "trainer", "launch") for file in Path(part).rglob("*.py")]
    read = {name for file in files for name in read_by(ast.parse(file.read_text()))}
    every = {*settings(Config), *settings(Cluster)}
    assert len(every) > 100
    assert [f"{kind}.{name}" for kind, name in sorted(every) if name not in read] == []


def test_its_help_is_short_and_a_wrong_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word, status in (("--help", 0), ("--nosuch", REFUSED)):
        with pytest.raises(SystemExit) as ended:
            describe.main([word])
        assert ended.value.code == status
        assert len("".join(capsys.readouterr()).splitlines()) < 12
