"""Averages of the weights: exponential ones by images, power functions and combinations of them."""

import math
from itertools import pairwise

import pytest
import torch

from tests.support import golden
from trainer.adm.ema import Average, Exponential, PowerFunction, Profile, combine, gamma, products

GOLDEN = golden.table("posthoc_ema")
HALF_LIFE = 2048 * math.log(2) / -math.log(0.9999)


def average(kind: Average, weights: dict[int, float]) -> float:
    """The average after updates at these clocks, from a random start of 1000."""
    value = 1000.0
    for since, now in pairwise([0, *weights]):
        beta = kind.beta(since=since, now=now)
        value = beta * value + (1 - beta) * weights[now]
    return value


def test_at_its_own_batch_a_span_in_images_is_the_decay_per_step_exactly() -> None:
    published = Exponential(decay=0.9999, images=2048, warmup=0.1)
    late = range(200_000 * 2048, 200_100 * 2048, 2048)
    assert all(published.beta(since=n, now=n + 2048) == 0.9999 for n in late)
    assert Exponential(decay=0.9999).beta(since=5, now=100) == 0.9999


def test_another_batch_and_skipped_steps_are_the_same_average() -> None:
    span = Exponential(decay=0.5, images=4096, warmup=0.5)
    fine = range(20_480, 40_961, 128)
    assert math.prod(span.beta(since=a, now=b) for a, b in pairwise(fine)) == pytest.approx(2**-5)
    assert span.beta(since=20_480, now=40_960) == pytest.approx(2**-5)


def test_a_warm_up_forgets_the_start_at_once_and_ends_at_its_share() -> None:
    span = Exponential(decay=0.9999, images=2048, warmup=0.1)
    assert average(span, {2048: 3.0}) == 3.0
    assert average(span, {n * 2048: 3.0 for n in range(1, 100)}) == pytest.approx(3.0)
    end = HALF_LIFE / 0.1
    for share, steady in ((0.99, False), (1.01, True)):
        now = round(share * end)
        assert (span.beta(since=now - 2048, now=now) == 0.9999) is steady
    # In the warm-up, half of the weight is younger than a tenth of the images seen.
    assert span.beta(since=900, now=1000) == pytest.approx(0.5, rel=0.05)


def test_widths_exponents_and_factors_are_the_recorded_ones() -> None:
    for sigma, expected in GOLDEN["gamma_of_sigma"]:
        assert gamma(sigma) == pytest.approx(expected, rel=1e-10)
    for g, sigma in GOLDEN["sigma_of_gamma"][1:]:
        assert gamma(sigma) == pytest.approx(g, rel=1e-9)
    for case in GOLDEN["beta"]:
        now, width = case["images_after"], case["sigma"]
        found = PowerFunction(width=width).beta(since=now - case["batch"], now=now)
        assert found == pytest.approx(case["beta"], rel=1e-10)
    for case in GOLDEN["inner_product"]:
        a, b = (Profile(case[side]["images"], case[side]["sigma"]) for side in "ab")
        assert products([a, b], [b, a])[[0, 1], [0, 1]].tolist() == pytest.approx(
            [case["value"]] * 2, rel=1e-10
        )


@pytest.mark.parametrize("case", GOLDEN["solved"], ids=lambda case: case["name"])
def test_stored_averages_combine_as_recorded(case: dict) -> None:
    stored = [Profile(images, width) for images, width in case["inputs"]]
    tolerance = 1e-6 if case["condition"] < 1e4 else 1e-4
    recorded = zip(
        case["targets"], case["coefficients"], case["relative_profile_error"], strict=True
    )
    for width, coefficients, error in recorded:
        found = combine(stored, wanted=Profile(case["at"], width))
        assert found.coefficients == pytest.approx(coefficients, abs=tolerance)
        assert sum(found.coefficients) == pytest.approx(1)
        assert found.error == pytest.approx(error, rel=0.02, abs=1e-4)


def test_a_weight_averaged_along_the_way_is_rebuilt_afterwards() -> None:
    case = GOLDEN["one_weight"]
    batch = case["batch"]
    weights = {n * batch: math.sin(0.05 * n) + n / 400 for n in range(1, case["steps"] + 1)}
    stored, values = [], []
    for width, snapshots in case["snapshots"].items():
        kind = PowerFunction(width=float(width))
        for step, value in snapshots:
            until = {now: weight for now, weight in weights.items() if now <= step * batch}
            assert average(kind, until) == pytest.approx(value, abs=1e-7)
            stored.append(Profile(step * batch, float(width)))
            values.append(value)
    for target in case["targets"]:
        found = combine(stored, wanted=Profile(case["steps"] * batch, target["sigma"]))
        rebuilt = sum(c * v for c, v in zip(found.coefficients, values, strict=True))
        assert rebuilt == pytest.approx(target["reconstructed"], abs=1e-7)
        tracked = average(PowerFunction(width=target["sigma"]), weights)
        assert tracked == pytest.approx(target["tracked"], abs=1e-7)


def test_after_a_rollback_the_error_counts_what_was_passed_over() -> None:
    """A run of 1000 updates went back from 800 to 600: its averages, weight by weight."""
    gaps, width, wanted = ((600.0, 800.0),), 0.1, Profile(1000, 0.075)
    times = [time for time in range(50, 1001, 50) if not 600 < time <= 800]
    stored = [Profile(time, width, gaps if time > 800 else ()) for time in times]
    path = [*range(1, 601), *range(801, 1001)]
    share, shares = torch.zeros(1001, dtype=torch.float64), {}
    for before, now in pairwise([0, *path]):
        beta = PowerFunction(width=width).beta(since=800 if now == 801 else before, now=now)
        share = beta * share
        share[now] += 1 - beta
        shares[now] = share
    ideal = torch.arange(1001, dtype=torch.float64) ** gamma(wanted.width)
    ideal = ideal / ideal.sum()
    found = combine(stored, wanted=wanted)
    made = sum(c * shares[time] for c, time in zip(found.coefficients, times, strict=True))
    assert found.error == pytest.approx(float((made - ideal).norm() / ideal.norm()), rel=0.05)
    assert found.error > 1.5 * combine([Profile(t, width) for t in times], wanted=wanted).error
