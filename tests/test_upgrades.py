"""Runs and records that another release, or the same with other packages, has left on disk."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launch.records import Submitted
from tests.support.runs import HALF, Place
from trainer.run import lease
from trainer.run.checkpoint import STATE, read, sealed


def of_another_release(
    place: Place, name: str, *, drop: tuple[str, ...] = (), **state: Any
) -> Path:
    """A run with half of the images: its checkpoint, as another release has written it."""
    place.fork("2x2", name, images=HALF)
    found = read(place.run(name) / "checkpoints" / f"{HALF:012d}")
    entries = sealed(replace(found.state, **state), files=found.files)
    for entry in drop:
        del entries[entry]
    (found.path / STATE).write_text(json.dumps(entries))
    return found.path


def test_a_setting_of_a_later_release_is_named_with_the_release(place: Place) -> None:
    """Back to the last release after a step with the next one."""
    config = place.run("2x2").joinpath("config.toml").read_text()
    later = config.replace("[training]\n", "[training]\nsharpness = 0.5\n")
    software = {"adm-trainer": "0.9.0 (abcdef0)"}
    newest = of_another_release(place, "downgraded", config=later, software=software)
    (said,) = place.train(place.arguments("downgraded"), world=1)
    assert said.startswith(f"the config in {newest / STATE}: unknown setting 'training.sharpness'")
    assert "; adm-trainer 0.9.0 (abcdef0) wrote it, and this is " in said


def test_other_software_than_that_of_the_checkpoint_is_in_the_log(place: Place) -> None:
    """Releases up to 0.2.0 recorded the version of torch alone."""
    of_another_release(place, "upgraded", drop=("software", "sha256"))
    path = place.run("upgraded") / "checkpoints" / f"{HALF:012d}" / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "2.0.1"}))
    assert place.train(place.arguments("upgraded"), world=1) == [0]
    log = place.log("upgraded")
    changes = re.findall(r"  ([\w-]+) changes from (.*)", log)
    assert changes == [("torch", f"2.0.1 to {torch.__version__}")]
    now = read(place.run("upgraded") / "checkpoints" / f"{2 * HALF:012d}").state.software
    assert now["torch"] == torch.__version__ and {"adm-trainer", "deepspeed", "numpy"} <= {*now}


def test_records_of_a_later_release_are_read(tmp_path: Path) -> None:
    """With another entry in its file a live writer was none, and its run was taken over."""
    (tmp_path / "launch").mkdir()
    held = lease.claim(tmp_path)
    for name, entries in {
        "writer": json.loads((tmp_path / "launch" / "writer.json").read_text()),
        "job": {"launcher": "slurm", "nodes": 2, "gpus_per_node": 8},
    }.items():
        text = json.dumps({**entries, "of_tomorrow": {"a": 1}})
        (tmp_path / "launch" / f"{name}.json").write_text(text)
    assert lease.holder(tmp_path) == held.me
    assert Submitted.of(tmp_path) == Submitted("slurm", 2, 8)
    held.release()
