"""launch/README.md: each of its commands runs on the test cluster as written."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from data import pack
from tests.support.cluster import LIMIT, ROOT, wait_until
from tests.support.site import Site
from trainer.run.runstate import RunState

PAGE = ROOT / "launch" / "README.md"


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def images_seen(run: Path) -> int:
    state = RunState.read(run)
    return state.images_seen if state else 0


def commands() -> list[str]:
    """The lines of the page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.timeout(4 * LIMIT)
def test_every_command_of_the_page_runs_as_written(site: Site) -> None:
    here = site.cluster.home / "checkout"
    for part in ("trainer", "data", "launch"):
        shutil.copytree(ROOT / part, here / part)
    for preset in ("digits", "digits_classifier"):  # on no machine a run ends before it is stopped
        file = here / "trainer" / "presets" / f"{preset}.toml"
        file.write_text(
            re.sub(r"^images = [\d_]+", "images = 80_000_000", file.read_text(), flags=re.M)
        )
    shutil.copy(ROOT / "ds_config.json", here)
    assert pack.main(["digits", str(here / "shards" / "digits"), "--size", "8"]) == 0

    def run(command: str) -> str:
        return site.cluster.run("ctl", "bash", "-c", f"cd {here} && {command}")

    def run_until(text: str, command: str) -> None:
        """Run a command that does not end by itself until it has printed `text`."""
        said = site.cluster.home / "said.txt"
        said.unlink(missing_ok=True)
        words = f"cd {here} && exec timeout {LIMIT:g} {command} > {said} 2>&1"
        process = site.cluster.start("ctl", "bash", "-c", words)
        wait_until(lambda: text in read(said), f"{text!r} from {command}")
        (pid,) = site.cluster.pids("ctl", [f"timeout {LIMIT:g} "])
        os.kill(pid, signal.SIGTERM)
        process.communicate(timeout=LIMIT)

    for command in commands():
        if "--watch" in command:
            run_until("images/s", command)
            continue
        if command.startswith("tensorboard"):
            run_until("http://", command)
            continue
        said = run(command)
        if command.startswith("cp "):
            shutil.copy(site.settings("slurm"), here / "my.toml")  # what the user changes in it
        elif "--dry-run" in command:
            assert said.startswith("#!/bin/bash") and not (here / "runs").exists()
        elif "--check" in command:
            metrics = here / "runs" / "digits" / "metrics.jsonl"
            wait_until(lambda metrics=metrics: "\n" in read(metrics), "a report")
        elif command.endswith("runs/digits") and "status" in command:
            assert ": RUNNING" in said and "images/s" in said
        elif "launch sample" in command:
            out = here / command.split("--out ")[1].split()[0]
            wait_until(out.exists, f"the images of {command}")
    first, last = (here / "runs" / "both" / name for name in ("digits", "digits_classifier"))
    for path in (first, last):
        wait_until(lambda path=path: images_seen(path) > 0, f"{path.name} in the sweep")

    # What happens to one run of an array, its last one too, leaves the others alone.
    run(f"scancel --signal=USR1 --batch {read(last / 'launch' / 'job')}")
    wait_until(lambda: RunState.read(last).starts == 2, "the requeued run of the sweep")
    run(f"python -m launch stop {last}")
    assert "saved; requeued, resumes" in read(last / "launch" / "events.txt")
    assert site.state(read(first / "launch" / "job").strip()) == "RUNNING"
    assert read(first / "launch" / "events.txt").count("\n") == 1
    state = RunState.read(here / "samples" / "digits.job")
    assert state is not None and state.state == "finished"
    run(f"python -m launch stop {first}")
    assert "stopped as requested" in read(first / "launch" / "events.txt")
