"""`--from CHECKPOINT`: a run goes back, once, and loses nothing of what came after."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import END, EVERY, HALF, STEP, Place, equal


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    here = Place(tmp_path_factory.mktemp("goback"), tiny)
    assert here.train(here.arguments("base", sets=EVERY), world=2) == [0]
    return here


def rows(file: Path) -> list[int]:
    return [json.loads(line)["images"] for line in file.open()]


def test_a_run_goes_back_once_and_sets_aside_what_came_after(bare: Place) -> None:
    bare.fork("base", "back", images=END)
    checkpoints = bare.run("back") / "checkpoints"
    target = checkpoints / f"{HALF:012d}"
    torn = [*bare.arguments("back", sets=EVERY), "--from", str(STEP)]
    broken = checkpoints / f"{STEP:012d}" / "adam-m.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    unknown = [*bare.arguments("back", sets=EVERY), "--from", "5"]
    foreign = [*bare.arguments("back", sets=EVERY), "--from", str(bare.run("base") / "c" / "12")]
    back = [*bare.arguments("back", stage=3, sets=EVERY), "--from", str(target)]
    beside = {"samples": "png", "evaluations": "json"}
    for directory, suffix in beside.items():
        (bare.run("back") / directory).mkdir()
        for name in (f"{HALF:012d}", f"{HALF + STEP:012d}", f"{END:012d}", "my-own"):
            (bare.run("back") / directory / f"{name}.{suffix}").touch()
    odd = bare.arguments("back", sets=(*EVERY, "training.batch = 16", "training.images = 80"))
    late = [*odd, "--from", str(HALF)]
    other, later, *refused, done = bare.train(odd, late, torn, unknown, foreign, back, world=2)
    assert f"training.batch = 16: must divide the {END} images that the run has seen" in other
    assert other.endswith(f"keep the batch that it has, or go back with --from {48:012d}")
    # Refused before anything is set aside: all of it is there for the next ones.
    assert f"must divide the {HALF} images that the run has seen: keep the batch" in later
    assert "is damaged: adam-m.safetensors has" in refused[0]
    assert f"has no such checkpoint; it has: {END:012d}, " in refused[1]
    assert "(weights of another run: --init)" in refused[2]
    assert done == 0
    clocks = range(HALF + STEP, END + 1, STEP)
    aside = sorted(checkpoints.glob("*.set-aside"))
    assert [int(path.name[:12]) for path in aside] == list(clocks)
    assert rows(bare.run("back") / "metrics.set-aside.jsonl") == list(clocks)
    assert rows(bare.run("back") / "metrics.jsonl") == list(range(STEP, END + 1, STEP))
    for directory, suffix in beside.items():
        names = sorted(path.name for path in (bare.run("back") / directory).iterdir())
        gone = [f"{clock:012d}.{suffix}.set-aside" for clock in (HALF + STEP, END)]
        assert names == [f"{HALF:012d}.{suffix}", *gone, f"my-own.{suffix}"]
    assert "went back to checkpoint" in bare.log("back")
    assert f"resumes from checkpoint {HALF:012d}" in bare.log("back")
    assert "ds_config.zero_optimization.stage changes from 2 to 3\n" in bare.log("back")
    # The same command again, as a scheduler gives it, does not lose what was trained since; the
    # checkpoint may have been pruned.
    shutil.rmtree(target)
    more = [*bare.arguments("back", sets=(f"training.images = {END + STEP}",)), "--from", str(HALF)]
    assert bare.train(more, world=2) == [0]
    assert "was done before" in bare.log("back")
    assert f"resumes from checkpoint {END:012d}" in bare.log("back")


def test_going_back_changes_no_later_step(bare: Place) -> None:
    bare.fork("base", "same", images=END)
    assert bare.train([*bare.arguments("same"), "--from", str(HALF)], world=2) == [0]
    assert bare.losses("same") == bare.losses("base")
    assert equal(bare.checkpoint("same", END), bare.checkpoint("base", END))
