"""Averages of the weights in real runs: their closed form, skipped steps, runs of version 0.1."""

import json
import os
import re
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from data import files
from data.exits import REFUSED
from tests.support import ranks
from tests.support.runs import END, EVERY, HALF, STEP, Place, build_start, equal
from trainer import ema
from trainer.adm.ema import Average, Exponential, PowerFunction
from trainer.config import experiment as configs
from trainer.ranks.world import World
from trainer.run.checkpoint import read
from trainer.run.directory import Run
from trainer.snapshots import Snapshots

# Eight steps: with fewer, the last one would be skipped.
LAST = 8 * STEP
SPANS = (
    f"training.ema_images = {2 * STEP}",
    "training.ema_warmup = 0.5",
    "training.ema_widths = [0.05, 0.1]",
    f"intervals.averages = {STEP}",
    f"training.images = {LAST}",
    *EVERY,
)
ADAMW = ("training.betas = [0.8, 0.99]", "training.weight_decay = 0.1", "training.clip = 0.1")
# What is drawn follows from losses, after ten of each t.
LEARNED = ('training.timesteps = "loss-second-moment"', "diffusion.steps = 2")
SLOWER = ("training.batch = 6", "intervals.log = 6", "intervals.checkpoint = 6")
NAMES = ("spans2", "spans3", "spans2-slower", "spans3-slower")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """Runs in fp16 whose first step is skipped, in two stages, and resumed with half the batch.

    And "older", begun as by version 0.1 and resumed with a preset that counts images.
    """
    place = Place(tmp_path_factory.mktemp("averages"), tiny)
    half = [
        place.arguments(f"spans{n}", stage=n, fp16=True, sets=(*SPANS, stored))
        for n, stored in ((2, 'intervals.averages_precision = "fp32"'), (3, "intervals.keep = 8"))
    ]
    per_step = place.arguments("per-step", sets=(*EVERY, *ADAMW, *LEARNED))
    assert place.train(*half, per_step, world=2, fp16=True) == [0, 0, 0]
    for n in (2, 3):
        place.fork(f"spans{n}", f"spans{n}-slower", images=HALF)
    shutil.rmtree(place.run("spans3-slower") / "averages")
    (place.run("spans3-slower") / "averages").touch()  # in place of the directory
    place.fork("per-step", "older", images=HALF)
    for state in place.run("older").glob("checkpoints/*/state.json"):
        # As version 0.1 wrote it: neither the clock of the last update nor its own checksum.
        text = re.sub(r' *"updated_at": \d+,\n', "", state.read_text())
        state.write_text(re.sub(r',\s*"sha256": "[0-9a-f]{64}"\s*\}$', "}", text))
        assert "updated_at" not in state.read_text()
    slower = [
        place.arguments(f"spans{n}-slower", stage=n, fp16=True, sets=(*SPANS, *SLOWER))
        for n in (2, 3)
    ]
    today = (f"training.ema_images = {STEP}", "training.ema_warmup = 0.1")
    older = place.arguments("older", sets=(*today, *ADAMW, *LEARNED))
    assert place.train(*slower, older, world=2, fp16=True) == [0, 0, 0]
    return place


def closed_form(runs: Place, name: str, average: Average) -> dict[str, Tensor]:
    """An average of the weights after each update, float64."""
    value = {key: weight.double() for key, weight in build_start(runs).items()}
    for since, now in pairwise([0, *updates(runs, name)]):
        beta, weights = average.beta(since=since, now=now), runs.weights(name, now)
        value = {key: beta * v + (1 - beta) * weights[key].double() for key, v in value.items()}
    return value


@pytest.mark.parametrize(
    ("kind", "average"),
    [
        ("ema-0.5", Exponential(decay=0.5, images=2 * STEP, warmup=0.5)),
        ("ema-0.9", Exponential(decay=0.9, images=2 * STEP, warmup=0.5)),
        ("power-0.05", PowerFunction(width=0.05)),
        ("power-0.1", PowerFunction(width=0.1)),
    ],
)
def test_averages_by_images_pass_over_skipped_steps_and_changed_batches(
    runs: Place, kind: str, average: Average
) -> None:
    for name in NAMES:
        assert runs.values(name, "skipped")[STEP] == 1, "the first step must overflow at 2^20"
        last = runs.checkpoint(name, updates(runs, name)[-1])
        for key, value in closed_form(runs, name, average).items():
            assert last[f"{kind}:{key}"].double().allclose(value, rtol=1e-5, atol=1e-7), name


def test_a_run_goes_on_with_averages_per_step_and_with_the_losses_of_timesteps(runs: Place) -> None:
    assert equal(runs.checkpoint("older", END), runs.checkpoint("per-step", END))
    learned = read(runs.run("older") / "checkpoints" / f"{HALF:012d}").state.timesteps
    assert all(len(losses) == 10 for losses in learned["losses"])
    assert "ema is per step" in runs.log("older")


def test_a_step_is_that_of_adamw_with_the_settings(runs: Place) -> None:
    """The gradient follows from the first moments; second moments and weights from it."""
    training = configs.load(runs.preset, ADAMW).training
    (one, two), before, count = training.betas, 2 * STEP, 3
    old, new = (runs.checkpoint("per-step", images) for images in (before, before + STEP))
    m, new_m, v, new_v, w, new_w = (
        torch.cat([state[key].double().flatten() for key in sorted(old) if key.startswith(kind)])
        for kind in ("adam-m:", "adam-v:", "model:")
        for state in (old, new)
    )
    gradient = (new_m - one * m) / (1 - one)
    assert runs.values("per-step", "grad_norm")[before + STEP] > 0.2
    assert gradient.norm().item() == pytest.approx(0.1, rel=1e-3)  # training.clip
    torch.testing.assert_close(new_v, two * v + (1 - two) * gradient**2, rtol=1e-4, atol=1e-12)
    rate = training.learning_rate(before)
    adam = new_m / (1 - one**count) / ((new_v / (1 - two**count)).sqrt() + 1e-8)
    decay = (w - new_w - rate * adam) @ w / (w @ w)
    assert decay.item() == pytest.approx(rate * 0.1, rel=0.01)


def snapshot(runs: Place, name: str, images: int) -> dict[str, Tensor]:
    """The tensors of a snapshot, by file and parameter name."""
    files = (runs.run(name) / "averages" / f"{images:012d}").glob("*.safetensors")
    return {f"{f.stem}:{key}": value for f in files for key, value in load_file(f).items()}


def updates(runs: Place, name: str) -> list[int]:
    """The clocks of a run after the steps that were not skipped."""
    return sorted(images for images, share in runs.values(name, "skipped").items() if not share)


@pytest.mark.parametrize(("name", "dtype"), [("spans2", torch.float32), ("spans3", torch.float16)])
def test_snapshots_hold_the_averages_of_the_checkpoints(
    runs: Place, name: str, dtype: torch.dtype
) -> None:
    assert len(updates(runs, name)) >= 3
    for images in updates(runs, name):
        state, stored = runs.checkpoint(name, images), snapshot(runs, name, images)
        assert len({key.partition(":")[0] for key in stored}) == 2
        assert all(torch.equal(value, state[key].to(dtype)) for key, value in stored.items())


def test_snapshots_beyond_the_checkpoint_are_set_aside_and_taken_again(runs: Place) -> None:
    names = sorted(p.name for p in (runs.run("spans2-slower") / "averages").iterdir())
    beyond = [f"{images:012d}" for images in range(4 * STEP, LAST + 1, STEP)]
    assert {name for name in names if "." in name} == {f"{name}.superseded" for name in beyond}
    assert set(beyond) < set(names)
    assert "5 snapshots beyond image 36 are not of the run any more" in runs.log("spans2-slower")


def test_a_snapshot_that_cannot_be_written_stops_nothing(runs: Place) -> None:
    """Its run has a file in place of the directory; its checkpoints are tested above."""
    assert "averages of image 96 are not kept" in runs.log("spans3-slower")


def test_a_width_made_afterwards_is_the_one_kept_all_along(
    runs: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run, last = runs.run("spans2"), updates(runs, "spans2")[-1]
    assert ema.main([str(run), "--sigma", "0.1", "0.075"]) == 0
    printed = capsys.readouterr().out
    assert "width 0.1: expected error 0.00%" in printed
    assert printed.index("width 0.075: expected error") < printed.index("file 1 of")
    state = runs.checkpoint("spans2", last)
    made = load_file(run / "averages" / f"power-0.1-{LAST:012d}.safetensors")
    for key, value in made.items():
        assert value.allclose(state[f"power-0.1:{key}"], rtol=1e-4, atol=1e-6)
    # Also up to an earlier time, if there is one after a step that was skipped.
    updated = updates(runs, "spans2")
    times = range(last - STEP, updated[0], -STEP)
    at = next((time for time in times if time not in updated), times[0])
    out = runs.root / "earlier.safetensors"
    words = ["--sigma", "0.1", "--at", str(at), "--out", str(out)]
    assert ema.main([str(run), *words]) == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["images"] == str(at)
    then = runs.checkpoint("spans2", max(time for time in updated if time <= at))
    for key, value in load_file(out).items():
        assert value.allclose(then[f"power-0.1:{key}"], rtol=1e-4, atol=1e-6)
    tracked = closed_form(runs, "spans2", PowerFunction(width=0.075))
    made = load_file(run / "averages" / f"power-0.075-{LAST:012d}.safetensors")
    between = {key: state[f"power-0.1:{key}"] - state[f"power-0.05:{key}"] for key in made}
    off = {key: value - tracked[key] for key, value in made.items()}
    assert norm(off) < 0.1 * norm(between)


def test_a_width_made_afterwards_can_be_drawn_from(runs: Place) -> None:
    run = runs.run("spans3")
    out = runs.root / "new" / "made.safetensors"
    assert ema.main([str(run), "--sigma", "0.13", "--out", str(out)]) == 0
    request = [str(out), "--out", str(runs.root / "drawn.npz"), "--images", "2", "--steps", "2"]
    assert ranks.sample(runs.root / "drawing", request) == [0]
    assert ranks.arrays(runs.root / "drawn.npz")[0].shape == (2, 8, 8, 3)


def test_a_snapshot_right_after_a_rollback_is_that_of_the_checkpoint(runs: Place) -> None:
    run, back, now = runs.root / "back", updates(runs, "spans2")[-1], 2 * LAST
    shutil.copytree(runs.run("spans2"), run)
    shutil.copytree(run / "averages" / f"{LAST:012d}", run / "averages" / f"{now:012d}")
    state = run / "averages" / f"{now:012d}" / "state.json"
    entries = json.loads(state.read_text())
    assert entries["updated_at"] == back
    state.write_text(json.dumps({**entries, "updated_at": now, "gaps": [[back, now]]}))
    assert ema.main([str(run), "--sigma", "0.06"]) == 0
    assert ema.main([str(run), "--sigma", "0.06", "--at", str(LAST)]) == 0
    made = (load_file(run / "averages" / f"power-0.06-{n:012d}.safetensors") for n in (now, LAST))
    assert equal(*made)


MODEL = "model.safetensors"


def test_what_cannot_be_made_is_one_line(
    runs: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, damaged = runs.run("spans2"), runs.root / "damaged"
    shutil.copytree(whole, damaged)
    file = damaged / "averages" / f"{LAST:012d}" / "power-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for words, message in (
        ([whole, "--sigma", "0.3"], "--sigma = 0.3: must be from 0.005 to below 0.2887"),
        (
            [whole, "--sigma", "0.1", "--at", "50"],
            "--at = 50: must be the time of a snapshot, such as",
        ),
        (
            [whole, "--sigma", "0.1", "--out", whole / "checkpoints" / f"{LAST:012d}" / MODEL],
            f"{MODEL}': must be a name that does not exist yet",
        ),
        (
            [whole, "--sigma", "0.1", "--out", whole / "log.txt" / MODEL],
            "its directory cannot be made (File exists)",
        ),
        ([whole, "--sigma", "0.1", "--out", "x.pt"], "a file that ends in .safetensors"),
        ([runs.run("per-step"), "--sigma", "0.1"], "has no snapshots of averages"),
        ([damaged, "--sigma", "0.075"], f"{file} is damaged: it does not match its checksum"),
    ):
        before = sorted(p for p in runs.root.rglob("*") if p.is_file())
        assert ema.main([str(word) for word in words]) == REFUSED
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert sorted(p for p in runs.root.rglob("*") if p.is_file()) == before
    # Somebody else's run: this is said before the snapshots are read.
    monkeypatch.setattr(files, "write_fault", lambda place: f"{place} is not writable")
    assert ema.main([str(damaged), "--sigma", "0.075"]) == REFUSED
    assert f"{file.parent.parent} is not writable: name another --out" in capsys.readouterr().err


def test_snapshots_beyond_the_clock_are_set_aside_also_where_none_is_taken(tmp_path: Path) -> None:
    for images_seen in (STEP, 2 * STEP):
        (tmp_path / "averages" / f"{images_seen:012d}").mkdir(parents=True)
    with Run(tmp_path).claimed() as run:
        config = configs.load("digits")
        Snapshots(run, config, world=World()).open(STEP, parameters=1)
    kept = sorted(path.name for path in (tmp_path / "averages").iterdir())
    assert kept == [f"{STEP:012d}", f"{2 * STEP:012d}.superseded"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can be another user")
def test_snapshots_that_cannot_be_set_aside_are_named() -> None:
    """A colleague made `averages/`: the log said that they had other names."""
    config = configs.load("digits")
    with tempfile.TemporaryDirectory() as place:
        snapshot = Path(place) / "averages" / f"{2 * STEP:012d}"
        snapshot.mkdir(parents=True)
        os.chmod(place, 0o777)
        os.seteuid(65534)
        try:
            with Run(Path(place)).claimed() as run:
                Snapshots(run, config, world=World()).open(STEP, parameters=1)
        finally:
            os.seteuid(0)
        log = Path(place, "log.txt").read_text()
        assert f"cannot be renamed (user nobody may not write {snapshot.parent}, which" in log
        assert f"remove {snapshot} and later ones" in log and "superseded" not in log


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in tensors.values()) ** 0.5
