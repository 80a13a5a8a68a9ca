"""Steps that go wrong: skipped on all ranks before anything moves, named, and gone back from."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import faults
from tests.support.runs import END, EVERY, GRIDS, STEP, Place, distance, equal
from trainer.config import experiment as configs
from trainer.engine.gate import StepReport
from trainer.engine.policy import Guards, Running
from trainer.guards.audit import Finding
from trainer.guards.incidents import Incidents
from trainer.guards.replay import Replay
from trainer.ranks.faults import Refused
from trainer.run.checkpoint import STATE, read, sealed
from trainer.run.runstate import committed
from trainer.snapshots import Snapshot

PASSED = ((4 * STEP, 8 * STEP),)
BAD = 2 * STEP + 1  # an image of the third step
GUARDS = (*EVERY, "guards.window = 2", "guards.spike = 20", "guards.in_a_row = 2")
#: Name -> ranks, stage, precision.
RUNS = {
    "one": (1, 2, "fp32"),
    "two-1": (2, 1, "fp32"),
    "two-2": (2, 2, "fp32"),
    "two-3": (2, 3, "fp32"),
    "brain": (2, 3, "bf16"),
    "half": (2, 2, "fp16"),
    "three": (3, 3, "fp32"),
}
#: Its checkpoint is due after the bad step alone, and so is late.
OWN = {"three": (f"intervals.checkpoint = {3 * STEP}",)}
#: Ranks and precision -> what the loss of an image is multiplied by.
FACTORS = {(1, False): math.nan, (2, False): 1e6, (2, True): math.nan, (3, False): math.inf}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """Runs of six steps in which the loss of one image is spoiled."""
    place = Place(tmp_path_factory.mktemp("guards"), tiny)
    for (world, fp16), factor in FACTORS.items():
        runs = [
            place.arguments(
                name,
                stage=stage,
                fp16=fp16,
                sets=(*GUARDS, f'training.precision = "{precision}"', *OWN.get(name, ())),
            )
            for name, (size, stage, precision) in RUNS.items()
            if size == world and fp16 == (precision == "fp16")
        ]
        done = faults.train(place, *runs, world=world, factors={BAD: factor}, fp16=fp16)
        assert done == [0] * len(runs)
    return place


def incidents(place: Place, name: str) -> list[dict]:
    return [json.loads(line) for line in (place.run(name) / "incidents.jsonl").open()]


@pytest.mark.parametrize("name", RUNS)
def test_a_refused_step_moves_nothing_and_its_image_is_named(here: Place, name: str) -> None:
    world, _, precision = RUNS[name]
    (row,) = incidents(here, name)
    assert (row["images"], row["in_a_row"]) == (2 * STEP, 1)
    assert row["replay"] == "the same on two ranks"
    worst, gradient = row["worst"][0], row["gradients"][0]
    assert (worst["image"], worst["rank"]) == (BAD, BAD % world)
    assert 0 <= worst["t"] < 1000 and ".tar: " in worst["key"]
    assert gradient["rank"] == BAD % world and BAD in gradient["micro_batch"]
    assert gradient["parameter"].endswith((".weight", ".bias"))
    assert f"step at image {2 * STEP} skipped: the " in here.log(name)
    saved = {int(p.name) for p in (here.run(name) / "checkpoints").iterdir()}
    if precision == "fp16":  # a scale that is too large is no incident, and an incident no overflow
        scales = here.losses(name, "loss_scale")
        assert scales[1] == scales[0] / 2 and scales[3] == scales[2]
        assert 3 * STEP not in saved
    else:
        whole = set(range(STEP, END + 1, STEP)) - {3 * STEP}
        assert saved == ({4 * STEP, END} if name in OWN else whole)
        assert here.losses(name, "skipped") == [0, 0, 1, 0, 0, 0]
    if precision == "fp32":
        assert distance(here.checkpoint(name, END), here.checkpoint("one", END)) < 5e-5


def test_an_overflow_at_the_floor_of_the_loss_scale_is_an_incident(here: Place) -> None:
    """Two steps overflow in fp16, of finite losses: the first halves the scale, to its floor."""
    arguments = here.arguments("floor", fp16=True, sets=GUARDS)
    file = Path(arguments[arguments.index("--ds-config") + 1])
    ds_config = json.loads(file.read_text())
    scale = {"initial_scale_power": 11, "min_loss_scale": 2**10, "loss_scale_window": 9}
    file = file.with_name("ds-floor.json")
    file.write_text(json.dumps(ds_config | {"fp16": ds_config["fp16"] | scale}))
    arguments[arguments.index("--ds-config") + 1] = str(file)
    factors = {STEP + 1: 1e30, 3 * STEP + 1: 1e30}
    assert faults.train(here, arguments, world=2, factors=factors, fp16=True) == [0]
    (row,) = incidents(here, "floor")
    assert (row["images"], row["fault"]) == (3 * STEP, "the gradients are not finite")
    assert here.losses("floor", "skipped") == [0, 1, 0, 1, 0, 0]
    assert here.losses("floor", "loss_scale") == [2**11] * 2 + [2**10] * 4


def rewind(place: Place, name: str, *, clock: int, to: int) -> None:
    """Keep one checkpoint of a run, and let it be one of the later clock `to`."""
    checkpoints = place.run(name) / "checkpoints"
    for path in checkpoints.iterdir():
        if int(path.name) != clock:
            shutil.rmtree(path)
    found = read(checkpoints / f"{clock:012d}")
    engine = {**found.state.engine, "updated_at": to}
    state = replace(found.state, images_seen=to, engine=engine)
    (found.path / STATE).write_text(json.dumps(sealed(state, files=found.files)))
    found.path.rename(checkpoints / f"{to:012d}")


@pytest.mark.slow
def test_after_too_many_in_a_row_the_run_goes_back_and_steps_over_the_images_since(
    here: Place,
) -> None:
    """Steps 6 to 8 (60 to 95) fail, and training goes on with 96 from the checkpoint at 48.

    So it does where it is stopped after step 7: that is saved, and removes no older checkpoint.
    """
    averages = ("training.ema_widths = [0.1]", f"intervals.averages = {STEP}")
    sets = (f"training.images = {10 * STEP}", *EVERY, *averages)
    sets = ("guards.in_a_row = 3", *sets)
    factors = dict.fromkeys(range(5 * STEP, 8 * STEP), math.inf)
    back = here.arguments("back", stage=3, sets=sets)
    assert faults.train(here, back, world=2, factors=factors) == [0]
    here.fork("back", "stopped", images=4 * STEP)
    shutil.copytree(here.run("back"), here.run("expected"))
    rewind(here, "expected", clock=4 * STEP, to=8 * STEP)
    here.fork("back", "again", images=9 * STEP)
    names = ("expected", "again", "stopped")
    sets = (*sets, "intervals.keep = 1")
    runs = [here.arguments(name, stage=3, sets=sets) for name in (*names, names[-1])]
    stops = {"stopped": 6 * STEP}
    assert faults.train(here, *runs, world=2, factors=factors, stops=stops) == [0, 0, 75, 0]
    assert f"checkpoint {7 * STEP:012d} committed" in here.log("stopped")
    for name in names:
        assert equal(here.checkpoint(name, 10 * STEP), here.checkpoint("back", 10 * STEP))
    said = "rolled back to checkpoint 000000000048; the run goes on at image 96"
    assert said in here.log("back") and said in here.log("stopped")
    state = read(here.run("again") / "checkpoints" / f"{10 * STEP:012d}").state.guards
    assert (state["rollbacks"], state["incidents"], state["row"]) == (1, 3, 0)
    # Averages of the weights that were gone back from are not of the run any more.
    kept = sorted(path.name for path in (here.run("back") / "averages").iterdir())
    aside = [f"{n * STEP:012d}.superseded" for n in (5, 6, 7)]
    assert kept == sorted([*(f"{n * STEP:012d}" for n in (1, 2, 3, 4, 8, 9, 10)), *aside])
    for name, clock, gaps in (("back", 4, ()), ("back", 10, PASSED), ("again", 10, PASSED)):
        snapshot = here.run(name) / "averages" / f"{clock * STEP:012d}"
        assert Snapshot.read(snapshot).gaps == gaps


def test_a_run_stops_when_no_rollback_is_left(here: Place) -> None:
    """The checkpoint at 36 is not committed: no step was taken from it."""
    sets = ("guards.in_a_row = 2", "guards.rollbacks = 1", f"training.images = {9 * STEP}", *EVERY)
    factors = dict.fromkeys(range(3 * STEP, 9 * STEP), math.nan)
    (said,) = faults.train(here, here.arguments("lost", sets=sets), world=2, factors=factors)
    assert f"the run has diverged after image {7 * STEP}: 2 steps in a row were skipped" in said
    assert "4 steps were skipped and 1 rollbacks made" in said
    saved = committed(here.run("lost") / "checkpoints")
    assert [int(path.name) for path in saved] == [2 * STEP, STEP]
    assert f"rolled back to checkpoint {2 * STEP:012d}; the run goes on at image {5 * STEP}" in (
        here.log("lost")
    )


def test_a_checkpoint_that_no_good_step_was_taken_from_is_not_gone_back_to(here: Place) -> None:
    """A grid is drawn as it is saved at 36, which commits it; the steps from 36 on fail.

    Where it is the only one that is kept, it is better than none.
    """
    grids = (f"intervals.samples = {3 * STEP}", "intervals.samples_count = 2", *GRIDS[2:])
    ends = ("guards.in_a_row = 2", "guards.rollbacks = 1", f"training.images = {9 * STEP}")
    factors = dict.fromkeys(range(3 * STEP, 5 * STEP), math.nan)
    sets = (*ends, *EVERY, *grids)
    runs = [
        here.arguments("drawn", sets=sets),
        here.arguments("alone", sets=(*sets, "intervals.keep = 1")),
    ]
    assert faults.train(here, *runs, world=2, factors=factors) == [0, 0]
    assert f"rolled back to checkpoint {3 * STEP:012d};" in here.log("alone")
    assert (here.run("drawn") / "checkpoints" / f"{3 * STEP:012d}").is_dir()
    assert f"rolled back to checkpoint {2 * STEP:012d};" in here.log("drawn")


def test_a_rollback_that_did_not_help_is_followed_by_one_to_an_older_checkpoint(
    here: Place,
) -> None:
    """Steps 4 and 5 fail; 6 is taken, and what is saved behind it is not committed; 7, 8 fail."""
    sets = ("guards.in_a_row = 2", f"training.images = {9 * STEP}", *EVERY)
    bad = [*range(3 * STEP, 5 * STEP), *range(6 * STEP, 8 * STEP)]
    arguments = here.arguments("further", sets=sets)
    assert faults.train(here, arguments, world=2, factors=dict.fromkeys(bad, math.nan)) == [0]
    said = [line.partition("rolled back to ")[2] for line in here.log("further").splitlines()]
    assert [line[:23] for line in said if line] == [
        f"checkpoint {2 * STEP:012d}",
        f"checkpoint {STEP:012d}",
    ]


def test_a_run_ends_with_one_skipped_step_and_has_diverged_with_two() -> None:
    config = configs.load("digits")
    guards, end = Guards(config), config.training.images
    guards.count(images_seen=end - 2)
    assert guards.may_finish(end) and not guards.may_finish(end - 1)
    guards.count(images_seen=end - 1)
    assert not guards.may_finish(end - 1)
    with pytest.raises(Refused, match="its last 2 steps were skipped"):
        guards.may_finish(end)


@pytest.mark.parametrize(("norm", "said"), [(1.05, "the same on two"), (1.2, "not reproduced")])
def test_a_gradient_that_its_replay_does_not_have_is_told(norm: float, said: str) -> None:
    """The norm of a mean is at most the mean of the norms."""
    none: dict[str, Any] = dict.fromkeys(("losses", "loss_bits", "bits", "norms", "products"), ())
    replay = Replay(micro_norms=(0.5, 1.5), **none)
    finding = Finding(replays=(replay, replay), hosts=("n1", "n2"), faults={})
    report = StepReport(loss=1.0, grad_norm=norm, loss_scale=1.0, skipped=True, fault="far")
    assert Incidents._replayed(report, finding).startswith(said)


def test_the_running_deviation_is_exact_at_first_and_then_forgets() -> None:
    running = Running()
    for value in (1.0, 3.0, 2.0, 4.0):
        assert running.deviations(1e9, window=4) == 0
        running.add(math.exp(value), window=4)
    assert running.mean == pytest.approx(2.5) and running.variance == pytest.approx(1.25)
    assert running.deviations(math.exp(4.0), window=4) == pytest.approx(1.5 / 1.25**0.5)
    for _ in range(100):
        running.add(7.0, window=4)
    assert running.deviations(7.0 * math.exp(0.5), window=4) == pytest.approx(10)
    running.add(0.0, window=4)
    assert math.isfinite(running.deviations(0.0, window=4))


def test_moments_of_earlier_releases_become_those_of_the_logarithm() -> None:
    """Exactly for a log-normal quantity, here of mean 0.3 and variance 0.4."""
    mean = math.exp(0.3 + 0.4 / 2)
    found = Running.of(mean, math.expm1(0.4) * mean**2, 9, is_log=False)
    assert (found.mean, found.variance, found.count) == (pytest.approx(0.3), pytest.approx(0.4), 9)
    assert Running.of(0.0, 0.0, 9, is_log=False) == Running()


def test_damaged_images_stop_a_run_by_their_share_of_all_that_it_has_seen() -> None:
    """Among the first 10,000 by their number."""
    config, said = configs.load("digits", ["data.max_bad = 0.01"]), list[str]()
    for before, seen in (([(100, 1.0)], 101), ([(5000, 0.009)] * 10 + [(5000, 0.0)], 55_102)):
        guards = Guards(config)
        for images, share in before:
            guards.check_damaged({"bad_share": share}, images=images, log=said.append)
        bad, more = round(sum(n * share for n, share in before)), seen - sum(n for n, _ in before)
        with pytest.raises(Refused, match=f"{bad + more} of {seen} images are damaged"):
            guards.check_damaged({"bad_share": 1.0}, images=more, log=said.append)
    assert len(said) == 13 and said[-2] == "450 of 50,000 images were damaged and replaced"


def test_a_heavy_tail_of_the_loss_is_no_spike_and_a_spike_is_one() -> None:
    """As in 1300 steps at batch 8: where t is near 0 the loss is up to 100 times larger."""
    guards, rng = Guards(configs.load("digits")), np.random.default_rng(0)
    losses = 0.12 * np.exp(rng.normal(0.0, 0.3, 20_000))
    tail = rng.random(20_000) < 0.01
    losses[tail] *= np.exp(rng.uniform(1.0, 4.6, tail.sum()))
    norms = 0.7 * np.exp(rng.normal(0.0, 0.45, 20_000))
    steps = zip(losses.tolist(), norms.tolist(), strict=True)
    assert not [said for loss, norm in steps if (said := guards.judge(loss, norm))]
    assert "the norm of the gradient is 200, " in str(guards.judge(0.12, 200.0))
    assert "the loss is 1e+04, " in str(guards.judge(1e4, 0.7 * math.exp(5 * 0.45)))
    kept = guards.state()
    earlier = {"batch": 64, "running": [{"mean": 0.2, "variance": 0.01, "count": 128}] * 2}
    for state, norm in ((kept, 200.0), (earlier, 40.0)):
        guards = Guards(configs.load("digits"))
        guards.load(state)
        assert guards.judge(0.15, 0.3) is None and guards.judge(0.12, norm) is not None


@pytest.mark.parametrize("setting", ["spike = 0", "window = 1", "in_a_row = 0", "rollbacks = -1"])
def test_limits_that_mean_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"guards.{setting}.*: must be "):
        configs.load("digits", [f"guards.{setting}"])


def test_a_run_may_let_spikes_pass_and_its_config_says_so(tmp_path: Path) -> None:
    config = configs.load("digits", ["guards.spike = inf"])
    (tmp_path / "again.toml").write_text(configs.to_toml(config))
    assert configs.load(tmp_path / "again.toml") == config
    guards = Guards(config)
    assert all(guards.judge(1.0, 1.0) is None for _ in range(1000))
    assert guards.judge(1e30, 1e30) is None
    assert guards.judge(math.nan, 1.0) == "the loss is nan"
    assert guards.judge(1.0, math.inf) == "the gradients are not finite"
