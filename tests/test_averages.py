"""Averages of the weights in real runs: their closed form, skipped steps, runs of version 0.1."""

import re
from pathlib import Path

import pytest

from tests.support.runs import END, EVERY, HALF, STEP, Place, build_start, equal
from trainer.adm.ema import Average, Exponential, PowerFunction

SPANS = (
    f"training.ema_images = {2 * STEP}",
    "training.ema_warmup = 0.5",
    "training.ema_widths = [0.05, 0.1]",
    f"training.images = {8 * STEP}",
    *EVERY,
)
SLOWER = ("training.batch = 6", "intervals.log = 6", "intervals.checkpoint = 6")
NAMES = ("spans2", "spans3", "spans2-slower", "spans3-slower")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """Runs in fp16 whose first step is skipped, in two stages, and resumed with half the batch.

    And "older", begun as by version 0.1 and resumed with a preset that counts images.
    """
    place = Place(tmp_path_factory.mktemp("averages"), tiny)
    half = [place.arguments(f"spans{n}", stage=n, fp16=True, sets=SPANS) for n in (2, 3)]
    assert place.train(*half, place.arguments("per-step", sets=EVERY), world=2, fp16=True) == [
        0,
        0,
        0,
    ]
    for n in (2, 3):
        place.fork(f"spans{n}", f"spans{n}-slower", images=4 * STEP)
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
    older = place.arguments("older", sets=today)
    assert place.train(*slower, older, world=2, fp16=True) == [0, 0, 0]
    return place


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
        skipped = runs.values(name, "skipped")
        assert skipped[STEP] == 1, "the first step at a scale of 2^20 must overflow"
        expected = {key: value.double() for key, value in build_start(runs).items()}
        since = 0
        for now in sorted(images for images, share in skipped.items() if not share):
            beta, weights = average.beta(since=since, now=now), runs.weights(name, now)
            for key, value in expected.items():
                expected[key] = beta * value + (1 - beta) * weights[key].double()
            since = now
        last = runs.checkpoint(name, since)
        for key, value in expected.items():
            assert last[f"{kind}:{key}"].double().allclose(value, rtol=1e-5, atol=1e-7), name


def test_a_run_that_counts_its_averages_per_step_goes_on_so(runs: Place) -> None:
    assert equal(runs.checkpoint("older", END), runs.checkpoint("per-step", END))
    assert "ema is per step" in runs.log("older")
