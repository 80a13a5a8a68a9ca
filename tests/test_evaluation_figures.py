"""The figures of evaluation against the ADM evaluator's own, and against their definitions."""

from fractions import Fraction
from statistics import stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import golden
from trainer.evaluation import figures
from trainer.evaluation.extraction import Extracted
from trainer.evaluation.reference import Reference
from trainer.evaluation.results import compare

TABLE = golden.table("evaluation")
RECORDED = golden.tensors("evaluation")


def sets(case: str) -> tuple[Tensor, Tensor]:
    """Reference and sample features of a recorded case."""
    plain = RECORDED["plain.ref"], RECORDED["plain.sample"]
    derived = {
        "plain_swapped": plain[::-1],
        "plain_same": (plain[0], plain[0]),
        "few_same": (RECORDED["few.ref"], RECORDED["few.ref"]),
        "plain_times_300": tuple(part * 300 for part in plain),
        "plain_two_samples": (plain[0], plain[1][:2]),
    }
    if case in derived:
        return derived[case]
    return RECORDED[f"{case}.ref"], RECORDED[f"{case}.sample"]


@pytest.mark.parametrize("case", TABLE["fid"])
def test_the_frechet_distance_is_the_recorded_one(case: str) -> None:
    wanted: dict[str, Any] = TABLE["fid"][case]
    reference, samples = sets(case)
    scale = max(1.0, wanted["trace_ref"] + wanted["trace_sample"])
    singular = case.startswith("few") or case == "plain_two_samples"
    by_features = figures.frechet_of_features(reference, samples)
    assert by_features == pytest.approx(wanted["float64"], abs=1e-10 * scale)
    by_moments = figures.frechet_distance(
        figures.statistics(reference), figures.statistics(samples)
    )
    within = 1e-5 if "same" in case else (1e-6 if singular else 1e-10) * scale
    assert by_moments == pytest.approx(wanted["float64"], abs=within)


@pytest.mark.parametrize("case", TABLE["precision_recall"])
def test_precision_and_recall_are_the_exact_ones(case: str) -> None:
    exact = TABLE["precision_recall"][case]["exact"]
    reference, samples = sets(case)
    [(precision, recall)] = figures.precision_recall(reference, samples)
    assert round(precision * len(samples)) == exact["in_ref"]
    assert round(recall * len(reference)) == exact["in_sample"]
    assert Fraction(exact["in_ref"], len(samples)) == Fraction(precision).limit_denominator(10000)


def test_copies_are_inside_of_the_set_that_has_them_four_times() -> None:
    rows = torch.randn(100, 2048, generator=torch.Generator().manual_seed(4)) + 1
    copies = rows.repeat(6, 1)[torch.randperm(600, generator=torch.Generator().manual_seed(5))]
    others = torch.randn(50, 2048, generator=torch.Generator().manual_seed(6)) + 1
    assert figures.precision_recall(copies, rows[:50])[0][0] == 1
    assert figures.precision_recall(rows[:50], copies)[0][1] == 1
    assert figures.precision_recall(copies, others)[0][0] == 0
    assert figures.precision_recall(copies, copies) == [(1, 1)]


def test_radii_are_the_recorded_ones() -> None:
    exact = TABLE["precision_recall"]["plain"]["exact"]
    found = figures.radii(RECORDED["plain.ref"])[0][:4].tolist()
    assert found == pytest.approx(exact["radii_ref_head"], rel=1e-9)


@pytest.mark.parametrize("case", TABLE["inception_score"])
def test_the_inception_score_is_the_recorded_one(case: str) -> None:
    wanted = TABLE["inception_score"][case]
    name = "score.extreme_features" if case == "extreme_logits" else "score.features"
    features = RECORDED[name].double()
    logits = features @ RECORDED["score.weight"].double()
    if case.startswith("sorted"):
        logits = logits[logits.argmax(dim=1).argsort(stable=True)]
    found = figures.inception_score(logits, split=wanted["split"])
    assert found == pytest.approx(wanted["float64"], rel=1e-9)


def test_the_error_of_the_inception_score_is_the_spread_over_every_fourth_sample() -> None:
    """Classes that are told apart in some fourths alone: scores of 1, 1, 2 and 2."""
    one, other = [30.0, 0.0], [0.0, 30.0]
    logits = torch.tensor([one, one, one, one, one, one, other, other] * 4)
    features = torch.rand(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = figures.statistics(features)
    found = Extracted(count=32, pool=(pool,) * 5, spatial=(), features=features, logits=logits)
    kept = {"pool": pool, "spatial": None, "features": features}
    same = Reference(name="same", checksum="0", count=32, **kept)
    figure = compare(found, same, labels=None, about={}, warnings=[]).figures["is_32"]
    assert figure.error == pytest.approx(stdev([1, 1, 2, 2]) / 2, rel=1e-6)


def test_the_inception_score_is_the_mean_over_splits_of_5000() -> None:
    logits = torch.randn(7000, 3, generator=torch.Generator().manual_seed(5))
    parts = [figures.inception_score(part, split=7000) for part in (logits[:5000], logits[5000:])]
    assert figures.inception_score(logits) == pytest.approx(sum(parts) / 2, rel=1e-12)


def test_moments_in_blocks_are_those_of_all_rows_even_far_from_zero() -> None:
    rows = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows += 1e6
    moments = figures.Moments(5)
    for block in rows.split(7):
        moments.add(block)
    torch.testing.assert_close(moments.statistics().covariance, rows.T.cov(), rtol=1e-9, atol=1e-9)


def test_the_kernel_distance_is_unbiased_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(2, 100, 8, generator=generator) for _ in range(50)]
    same = torch.tensor([figures.kernel_distance(x, y) for x, y in pairs])
    assert abs(same.mean()) < 4 * same.std() / 50**0.5
    x, y = pairs[0]
    shifted = [figures.kernel_distance(x, y + shift) for shift in (0.2, 0.5, 1.0)]
    assert shifted == sorted(shifted)
    assert shifted[-1] > 20 * same.std()


def test_subsets_of_many_rows_estimate_the_same_distance() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(1010, 2, generator=generator), torch.randn(1001, 2, generator=generator) + 1
    whole = figures.kernel_distance(x[:1000], y[:1000])
    assert figures.kernel_distance(x, y) == pytest.approx(whole, rel=0.02)


def test_the_kernel_distance_of_few_rows_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double() / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    wanted = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 30
    wanted -= 2 * sum(k(a, b) for a in x for b in y) / 36
    assert figures.kernel_distance(x, y) == pytest.approx(wanted, rel=1e-9)
