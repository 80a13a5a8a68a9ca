"""The page on clusters: every command of it runs on the test cluster as written."""

import re
import shutil

import pytest

from data import pack
from tests.cluster import ROOT, wait_until
from tests.site import Site

PAGE = ROOT / "launch" / "README.md"


def commands() -> list[str]:
    """The lines of the page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs_as_written(site: Site) -> None:
    here = site.cluster.home / "checkout"
    for part in ("trainer", "data", "launch"):
        shutil.copytree(ROOT / part, here / part)
    shutil.copy(ROOT / "ds_config.json", here)
    assert pack.main(["digits", str(here / "shards" / "digits"), "--size", "8"]) == 0

    def run(command: str, *, lasting: bool = False) -> str:
        words = f"cd {here} && {'timeout 5 ' if lasting else ''}{command}"
        return site.cluster.run("ctl", "bash", "-c", words, check=not lasting)

    for command in commands():
        lasting = "--watch" in command or command.startswith("tensorboard")
        said = run(command, lasting=lasting)
        if command.startswith("cp "):
            shutil.copy(site.settings("slurm"), here / "my.toml")  # what the user changes in it
        elif "--dry-run" in command:
            assert said.startswith("#!/bin/bash") and not (here / "runs").exists()
        elif "--check" in command:
            log = here / "runs" / "digits" / "log.txt"
            wait_until(lambda log=log: log.exists() and "images/s" in log.read_text(), "steps")
        elif command.endswith("runs/digits") and "status" in command:
            assert ": RUNNING" in said and "images/s" in said
    sweep = [here / "runs" / "both" / name for name in ("digits", "digits_classifier")]
    for path in sweep:
        wait_until(lambda path=path: (path / "log.txt").exists(), f"{path.name} in the sweep")
    for path in sweep:
        run(f"python -m launch stop {path}")
