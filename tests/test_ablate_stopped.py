"""A row that was stopped: it is not drawn and evaluated before it is finished, and what is of an
earlier state of its run is made again.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.exits import FAILED, REFUSED, TO_BE_CONTINUED
from tests.support import ranks
from trainer.ablate import main
from trainer.ablations.rows import outdated, remove_outdated, training_status
from trainer.ablations.sets import load
from trainer.run.lease import live_holder, request_stop, stop_file
from trainer.run.runstate import RunState

SET = """
base = "{tiny}"
set = ["training.images = {images}"]
[samples]
images = 16
steps = "2"
reference = "{digits}"
network = "{network}"
[[rows]]
name = "Base"
[[rows]]
name = "second"
"""


@pytest.mark.parametrize(
    ("state", "launcher", "status"),
    [
        ("finished", 0, 0),
        ("finished", 1, 0),
        ("stopped", 0, TO_BE_CONTINUED),  # `launch stop` came before
        ("stopped", 1, TO_BE_CONTINUED),  # torchrun
        ("refused", 1, REFUSED),
        ("failed", 1, FAILED),
        ("running", 0, FAILED),
        ("running", -9, -9),
    ],
)
def test_a_runs_own_state_says_how_its_training_ended(
    state: str, launcher: int, status: int, tmp_path: Path
) -> None:
    assert training_status(tmp_path, before=None, status=launcher) == (launcher or FAILED)
    (tmp_path / "launch").mkdir()
    before = RunState(state="stopped", starts=1)
    before.write(tmp_path)
    # Refused before it claimed the run.
    assert training_status(tmp_path, before=before, status=REFUSED) == REFUSED
    RunState(state=state, starts=2).write(tmp_path)
    assert training_status(tmp_path, before=before, status=launcher) == status


def test_figures_and_samples_are_of_the_finished_run(
    tiny: Path, digits: Path, tmp_path: Path
) -> None:
    path, runs = tmp_path / "set.toml", tmp_path / "runs"
    path.write_text(SET.format(tiny=tiny, images=32, digits=digits, network="n.pt2"))
    found = load(str(path), (), unset=())
    row, here = found.rows[0], runs / "base"

    def train(images: int, *, stopped: bool = False) -> None:
        words = ["train", str(tiny), "--run", str(here / "run")]
        words += ["--set", f"training.images = {images}"]
        ranks.start(tmp_path / f"job-{images}-{stopped}", ranks=1, runs=[words]).wait()

    def draw() -> None:
        words = [here / "run", "--out", here / "samples.npz", "--images", 16, "--steps", "2"]
        assert ranks.sample(tmp_path / f"draw-{len(list(tmp_path.iterdir()))}", words) == [0]
        with np.load(here / "samples.npz") as samples:
            drawn = json.loads(str(samples["request"]))
        about = {"samples": {"drawn": drawn}}
        (here / "figures.json").write_text(json.dumps({"figures": {}, "about": about}))

    both = [here / "figures.json", here / "samples.npz"]
    assert outdated(found, row, runs=runs) == []
    train(16)
    request_stop(here / "run")
    train(32, stopped=True)
    draw()
    assert RunState.read(here / "run").state == "stopped"
    assert outdated(found, row, runs=runs) == both
    stop_file(here / "run").unlink()
    train(32)
    said = []
    remove_outdated(found, row, runs=runs, say=said.append)
    assert len(said) == 2 and sorted(p.name for p in here.iterdir()) == ["run"]
    draw()
    assert outdated(found, row, runs=runs) == []
    # As of version 0.1, which did not write of what they are; and a run without its checkpoints.
    (here / "figures.json").write_text('{"figures": {}, "about": {"samples": {"drawn": null}}}')
    assert outdated(found, row, runs=runs) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_ends_the_set_and_is_resumed(
    number: signal.Signals,
    tiny: Path,
    digits: Path,
    network: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    """On two ranks, whose torchrun ends with 1; TERM to one process, Ctrl-C to the group."""
    path, runs = tmp_path / "set.toml", tmp_path / "runs"
    path.write_text(SET.format(tiny=tiny, images=100_000, digits=digits, network=network))
    words = [str(path), "--runs", str(runs), "--ranks", "2"]
    run, here = runs / "base" / "run", runs / "base"
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.ablate", *words],
            env=ranks.environment() | {"PYTHONPATH": str(ranks.ROOT)},
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    ranks.wait_for(run / "checkpoints")
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    process.wait()
    said = (tmp_path / "output.txt").read_text()
    request_stop(run)  # also where this test fails
    assert process.returncode == TO_BE_CONTINUED, said
    assert "row 'Base': trainer.train is stopped; rerun the same command to resume" in said
    assert "trainer/ablate.py" not in said  # a traceback
    state = RunState.read(run)
    assert state.state == "stopped" and state.checkpoint and live_holder(run) is None, said
    assert not (runs / "second" / "run").exists()
    assert main(words[:-2]) == TO_BE_CONTINUED
    way = f"to resume, delete {stop_file(run)} and rerun the same command"
    assert way in capfd.readouterr().out
    assert sorted(p.name for p in here.iterdir()) == ["row.json", "run"]
