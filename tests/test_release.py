"""What a release has beside the code: images, CI of GitHub, issue forms, the citation."""

import itertools
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from data.version import VERSION

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "launch" / "images"
# The groups of every Debian and Ubuntu.
GROUPS = Path("/usr/share/base-passwd/group.master")
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


@cache
def lines(name: str) -> tuple[str, ...]:
    """The instructions of an image's file, without comments, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", (IMAGES / name).read_text(), flags=re.MULTILINE)
    return tuple(line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line)


def commands(name: str) -> list[list[str]]:
    """The shell commands that build an image, as words."""
    found = [part for line in lines(name) for part in line.removeprefix("RUN ").split("&&")]
    starts = ("apt-get", "DEBIAN_FRONTEND", "pip", "python3")
    return [shlex.split(part) for part in found if part.strip().startswith(starts)]


def copied(name: str) -> list[str]:
    """The files of the checkout that go into an image."""
    if name == "Dockerfile":
        words = [line.split()[1:-1] for line in lines(name) if line.startswith("COPY ")]
        return [source for sources in words for source in sources]
    inside = lines(name)[lines(name).index("%files") + 1 : lines(name).index("%post")]
    return [line.split()[0] for line in inside]


@cache
def pins() -> dict[str, str]:
    """The versions of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    return {n.lower().replace("_", "-"): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def pinned(requirement: Requirement) -> bool:
    """Whether constraints.txt has a version of a requirement that satisfies it."""
    name = requirement.name.lower().replace("_", "-")
    return name in pins() and requirement.specifier.contains(pins()[name])


@pytest.mark.parametrize("name", ["Dockerfile", "adm.def"])
def test_an_image_copies_what_is_there_and_all_that_runs(name: str) -> None:
    sources = copied(name)
    assert {"data", "trainer", "launch", "pyproject.toml", "constraints.txt"} <= {*sources}
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_builder_gets_exactly_what_is_copied() -> None:
    ignore = (IMAGES / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(
        copied("Dockerfile")
    )


@pytest.mark.parametrize("name", ["Dockerfile", "adm.def"])
def test_an_image_installs_the_pinned_versions_of_this_project(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pips = [words for words in commands(name) if words[0] == "pip"]
    assert [words[-1] for words in pips] == ["torch", ".[parquet,lmdb,s3,plots,wandb]"]
    for words in pips:
        assert words[words.index("-c") + 1] == "constraints.txt"
    extras = re.findall(r"\w+", pips[1][-1])
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    assert [text for text in wanted if not pinned(Requirement(text))] == []


def test_the_tested_versions_are_those_of_the_bounds_and_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    bounds = {each.name: each.specifier for each in map(Requirement, wanted)}
    table = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "install.md").read_text(),
        re.M,
    )
    bounds["Python"] = SpecifierSet(project["requires-python"])
    for name, lowest, *others in table:
        (bound,) = (each.version for each in bounds[name] if each.operator == ">=")
        assert Version(lowest) == Version(bound), name
        assert all(version in bounds[name] for version in others), name
        assert name == "Python" or others[1] == pins()[name], name
    assert [row[0] for row in table] == ["Python", "torch", "triton", "numpy", "pillow"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_all_packages_are_installed_on_both_architectures(machine: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *itertools.chain.from_iterable(optional)]
    there = {"platform_machine": machine, "sys_platform": "linux"}
    markers = {each.name: each.marker for each in map(Requirement, wanted)}
    assert [name for name, each in markers.items() if each and not each.evaluate(there)] == []


def test_both_images_are_the_same() -> None:
    assert commands("Dockerfile") == commands("adm.def")
    assert copied("Dockerfile") == copied("adm.def")
    bases = [
        re.search(r"^F(?:ROM|rom:) (\S+)$", "\n".join(lines(f)), re.M)
        for f in ("Dockerfile", "adm.def")
    ]
    assert bases[0] and bases[1] and bases[0][1] == bases[1][1]


def test_a_container_is_not_root_and_has_no_entry_point() -> None:
    users = [line for line in lines("Dockerfile") if line.startswith(("USER", "ENTRYPOINT"))]
    assert users == ["USER 10001", "ENTRYPOINT []"]


@pytest.mark.skipif(not GROUPS.exists(), reason=f"no {GROUPS}: this is not a Debian")
def test_the_user_of_the_container_is_none_of_the_groups_that_its_base_has() -> None:
    """`useradd` refuses such a name, as it did `adm`, and no image was built."""
    (added,) = (line.split()[-1] for line in lines("Dockerfile") if "useradd" in line)
    groups = {line.partition(":")[0] for line in GROUPS.read_text().splitlines()}
    assert "adm" in groups and added not in groups


def test_githubs_ci_runs_what_ci_runs() -> None:
    steps = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["ci"]["steps"]
    run = [step["run"] for step in steps if "run" in step]
    assert len(run) == 1 and run[0].endswith(" bash .ci/run")
    verbs = re.findall(r"^(?:\w+=\w+ )?make (\S+)", (ROOT / ".ci" / "run").read_text(), re.M)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert {"check", "test", "test-slow", "docs-check", "test-cluster"} == {*verbs}
    assert phony and {*verbs} <= {*phony[1].split()}


def test_a_bug_report_asks_for_what_tells_the_cause() -> None:
    asked = {field["id"]: field["attributes"]["label"] for field in read(FORMS / "bug.yml")["body"]}
    assert asked["preflight"] == "python -m trainer.preflight"
    assert asked["status"] == "python -m launch status RUN --json"
    assert asked["log"] == "RUN/log.txt"
    for form in FORMS.glob("*.yml"):
        assert read(form)


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == VERSION and citation["cff-version"] == "1.2.0"
    assert [*citation["authors"][0]] == ["name"]
    assert "Diffusion Models Beat GANs" in citation["references"][0]["title"]


def read(file: Path) -> Any:
    """The content of a YAML file."""
    return yaml.safe_load(file.read_text())
