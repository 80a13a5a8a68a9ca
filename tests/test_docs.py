"""The pages: links lead somewhere, options and settings exist, commands are read by their parsers.

`make docs-check` runs the commands as well (tests/test_docs_commands.py).
"""

import dataclasses
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest

from launch.cluster import Cluster
from tests.support import options
from tests.support.pages import PAGES, PROGRAMS, ROOT, Command, Page
from trainer.adm.config import ClassifierConfig
from trainer.config import experiment as configs
from trainer.config import flags
from trainer.config.experiment import Config

COMMANDS = [command for page in PAGES for command in page.commands]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_lead_to_files_and_headings(page: Page) -> None:
    for link in page.links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in Page(target).anchors, f"{page.name}: {link}"


def test_every_page_is_named_on_another() -> None:
    linked = {
        (page.path.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in page.links
        if "//" not in link
    }
    assert {page.path for page in PAGES} - linked <= {ROOT / "README.md"}


def test_every_picture_is_shown() -> None:
    pictures = {path.name for path in (ROOT / "docs" / "img").iterdir()}
    shown = {link.rpartition("/")[2] for page in PAGES for link in page.links}
    assert pictures <= shown


@each_page
def test_code_blocks_without_a_language_are_commands(page: Page) -> None:
    for command in page.commands:
        assert command.text.split()[0] in PROGRAMS, f"{command}\nname the language of the block"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_read_by_its_own_parser(command: Command) -> None:
    if command.module is not None:
        found = options.parse(command.module, command.arguments)
        if hasattr(found, "set") and isinstance(getattr(found, "preset", None), str):
            preset = found.preset.replace("my.toml", "digits")
            configs.load(preset, found.set, unset=found.unset)
        if command.arguments[:1] == ["sample"]:
            options.parse("trainer.sample", [*found.rest, "--out", found.out])
        return
    program, *words = command.words
    if program == "make":
        assert all(re.search(rf"^{word}:", read("Makefile"), flags=re.M) for word in words)
    elif program == "tensorboard":
        from tensorboard import program as tensorboard

        tensorboard.TensorBoard().configure(argv=[program, *words])
    elif program == "pip":
        extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
        named = re.findall(r"\[(.*?)\]", command.text)
        assert set(",".join(named).split(",")) - {""} <= extras.keys()


def read(name: str) -> str:
    return (ROOT / name).read_text()


def commands_in_prose(page: Page) -> Iterator[tuple[str, str]]:
    """The modules of the commands with options, and their arguments."""
    start = r"(?:torchrun .*-m -- |python -m )((?:trainer|data|launch)[\w.]*) (.*--.*)"
    for snippet in page.snippets:
        found = re.match(start, snippet)
        if found and "..." not in snippet:
            yield found[1], found[2]


@each_page
def test_commands_in_the_prose_are_read_by_their_parsers(page: Page) -> None:
    """Those with options; what is left out of one is written as three dots."""
    for module, words in commands_in_prose(page):
        options.parse(module, shlex.split(words))


@each_page
def test_options_in_the_prose_exist(page: Page) -> None:
    """Those of guided-diffusion, and of what other programs are told, aside."""
    theirs = {
        "--clusters", "--export", "--no-requeue", "--nproc-per-node", "--samples_per_plugin",
        "--shm-size", "--system-site-packages",
    }  # fmt: skip
    if page.name == "docs/from-guided-diffusion.md":
        theirs |= {f"--{name}" for name in flags.NAMES}
    for snippet in page.snippets:
        snippet = re.sub(r'--from-flags ".*"', "--from-flags", snippet)
        if "python -m" not in snippet and snippet.split()[0] in (*PROGRAMS, "python3", "squeue"):
            continue
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", snippet))
        assert named <= options_known_to(snippet) | theirs, f"{page.name}: `{snippet}`"


def options_known_to(snippet: str) -> frozenset[str]:
    """Of the command that it names, or of any."""
    found = re.search(r"python -m ([\w.]+)(?: (nll|reference|sample|status|stop|sweep))?", snippet)
    command = tuple(word for word in found.groups() if word) if found else ()
    if command not in options.COMMANDS:
        return options.all_options()
    also = options.options_of("trainer.sample") if command[-1] == "sample" else frozenset()
    return options.options_of(*command) | also


def fields(kind: type) -> Iterator[str]:
    """The settings of a dataclass and of its sections, as `section.name`."""
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        parts = [p for p in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(p)]
        yield field.name
        for part in parts:
            assert isinstance(part, type)
            yield from (f"{field.name}.{inner}" for inner in fields(part))


@cache
def settings() -> frozenset[str]:
    classifier = {f"model.{field.name}" for field in dataclasses.fields(ClassifierConfig)}
    return frozenset({*fields(Config), *classifier, *fields(Cluster)})


FILES = (".safetensors", ".json", ".md")


def settings_in_prose(page: Page) -> Iterator[tuple[str, str]]:
    """What looks like `training.lr` and `slurm.time`, and where it stands."""
    sections = "|".join({name.partition(".")[0] for name in settings() if "." in name})
    for snippet in page.snippets:
        for name in re.findall(rf"(?<![\w./*])(?:{sections})\.[a-z_]\w*(?![\w.(])", snippet):
            yield name, snippet


@each_page
def test_settings_in_the_prose_exist(page: Page) -> None:
    """Keys of ds_config.json stand alone."""
    modules = {p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.glob("data/**/*.py")}
    for name, snippet in settings_in_prose(page):
        is_file = name.replace(".", "/") in modules or name.endswith(FILES)
        assert is_file or name in settings(), f"{page.name}: `{snippet}`"


@each_page
def test_files_of_the_project_exist(page: Page) -> None:
    for path in files_in_prose(page):
        assert (ROOT / path).exists(), f"{page.name}: `{path}`"


def files_in_prose(page: Page) -> Iterator[str]:
    """Paths such as `trainer/loop.py`; not those of runs, which may be there too."""
    tops = [path.name for path in ROOT.iterdir() if [*path.glob("*.py"), *path.glob("*.md")]]
    for snippet in page.snippets:
        if re.fullmatch(r"[\w/-]+(/|\.(py|md|toml|sh))", snippet) and snippet.split("/")[0] in tops:
            yield snippet


def keys_in_prose(page: Page) -> Iterator[str]:
    """What is said to be in ds_config.json."""
    yield from re.findall(r"`(\w+)` in `ds_config\.json`", page.prose)


@pytest.mark.parametrize(
    ("find", "least"),
    [(commands_in_prose, 10), (settings_in_prose, 100), (files_in_prose, 20), (keys_in_prose, 1)],
)
def test_the_prose_has_what_is_checked_of_it(
    find: Callable[[Page], Iterator[Any]], least: int
) -> None:
    """Otherwise the tests of it would check nothing."""
    assert sum(1 for page in PAGES for _ in find(page)) >= least


def test_keys_of_ds_config_on_the_pages_exist() -> None:
    def keys(table: Mapping[str, Any]) -> Iterator[str]:
        for key, value in table.items():
            yield key
            if isinstance(value, dict):
                yield from keys(value)

    known = set(keys(json.loads(read("ds_config.json"))))
    for page in PAGES:
        for name in keys_in_prose(page):
            assert name in known, f"{page.name}: {name}"
