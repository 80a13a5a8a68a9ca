"""Keyed randomness: the same bits in any batch, and statistically random."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.adm import keyed, sampler
from trainer.adm.objective import draw_noise, drop_labels
from trainer.adm.timesteps import UniformTimesteps
from trainer.guards.replay import dropout_seed
from trainer.sampling.labels import Labels
from trainer.sampling.options import RANDOM

SHAPE = (3, 5, 7)

PINNED_WORDS = [
    [5531519400795769300, 6840196157732356029],
    [424835069833950762, -2764577781285403360],
    [-9150781230700133028, -5073081916677831381],
]
PINNED_UNIFORM = [0.23677700757980347, 0.2535274028778076, 0.43925940990448]
PINNED_NORMAL = [
    [-1.302467942237854, 0.5541260242462158, 1.3636236190795898, -0.6914176344871521],
    [0.8853535652160645, -1.7464863061904907, 1.0042005777359009, 0.24897032976150513],
    [-0.7925170063972473, 0.8908783197402954, -0.7958737015724182, 0.9990067481994629],
]
#: The stage of a network that draws, what it starts from, and the noise of its step 249.
PINNED_SAMPLES = [
    (
        0,
        [0.9702807664871216, -1.168032169342041, 0.3814789652824402],
        [0.6808757781982422, -1.1734405755996704, 0.5621357560157776],
    ),
    (
        256,
        [-2.291531801223755, -1.7630242109298706, -0.867912232875824],
        [0.7237030267715454, -0.054827526211738586, -0.999869167804718],
    ),
]


def test_the_bits_are_pinned() -> None:
    """These values must never change: a resumed or repeated run depends on them."""
    numbers = torch.tensor([0, 1, 2**40])
    words = keyed.hash64(numbers, seed=7, stream=1, count=2)
    assert words.tolist() == PINNED_WORDS
    assert keyed.uniform(numbers, seed=7, stream=0).tolist() == PINNED_UNIFORM
    noise = keyed.normal(numbers, seed=7, stream=1, shape=(4,))
    assert noise.tolist() == PINNED_NORMAL


def test_what_a_run_draws_is_pinned() -> None:
    """Each use has a stream of its own, the same in every release."""
    indices, one = torch.tensor([0, 1, 2**40]), torch.zeros(3, 1)
    assert UniformTimesteps(1000, seed=7).draw(indices)[0].tolist() == [236, 253, 439]
    assert draw_noise(one, indices, seed=7)[:, 0].tolist() == [row[0] for row in PINNED_NORMAL]
    kept = drop_labels(torch.arange(10), torch.arange(10), share=0.3, seed=7)
    assert kept.tolist() == [0, 1, 2, 3, -1, -1, 6, 7, 8, 9]
    random = Labels(rule=RANDOM, classes=tuple(range(1000)), seed=7)
    assert random.of(indices).tolist() == [362, 644, 134]
    for stage, start, step in PINNED_SAMPLES:
        given: dict[str, Any] = {"seed": 7, "shape": (1,), "stage": stage}
        assert sampler.start(indices, **given)[:, 0].tolist() == start
        assert sampler.step_noise(indices, **given)(249)[:, 0].tolist() == step
    assert dropout_seed(7, 2048, 1) == 3169830827286860488


def test_the_hash_is_splitmix64() -> None:
    """Seed 1234567 of the published generator: its first outputs."""
    state, outputs = torch.tensor([1234567]), []
    for _ in range(3):
        state = state + keyed._GAMMA
        outputs.append(keyed._mix(state).item() % 2**64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(
    numbers=st.lists(st.integers(0, 2**62), min_size=1, max_size=8),
    seed=st.integers(0, 2**63 - 1),
    cut=st.integers(0, 8),
)
def test_any_split_of_a_batch_draws_the_same(numbers: list[int], seed: int, cut: int) -> None:
    batch = torch.tensor(numbers)
    whole = keyed.normal(batch, seed=seed, stream=3, shape=SHAPE)
    for part, values in ((batch[:cut], whole[:cut]), (batch[cut:], whole[cut:])):
        assert torch.equal(keyed.normal(part, seed=seed, stream=3, shape=SHAPE), values)


def test_seed_stream_and_number_all_matter() -> None:
    def draw(number: int, seed: int, stream: int) -> tuple[float, ...]:
        noise = keyed.normal(torch.tensor([number]), seed=seed, stream=stream, shape=(4,))
        return tuple(noise[0].tolist())

    draws = {draw(n, seed, stream) for n in range(5) for seed in range(5) for stream in range(5)}
    assert len(draws) == 125


def test_normal_moments_tails_and_correlations() -> None:
    noise = keyed.normal(torch.arange(1000), seed=0, stream=1, shape=(1000,)).double()
    count = noise.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = (math.prod(range(1, 2 * power, 2)) / count) ** 0.5
        assert abs(noise.pow(power).mean().item() - moment) < 4 * spread
    ordered = noise.flatten().sort().values
    share = torch.arange(count, dtype=torch.float64) / count
    assert (torch.special.ndtr(ordered) - share).abs().max() < 1.95 / count**0.5
    for one, other in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        assert (one * other).mean().abs() < 4 / count**0.5


def test_uniform_is_even_and_below_one() -> None:
    u = keyed.uniform(torch.arange(200_000), seed=3, stream=0)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 2000).square() / 2000).sum() < 150
