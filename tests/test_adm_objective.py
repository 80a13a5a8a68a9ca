"""What is minimised: the same for any split of a batch, weighted without bias."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.adm.config import NO_LABEL, DiffusionConfig
from trainer.adm.objective import Classify, Denoise, drop_labels
from trainer.adm.timesteps import LossSecondMoment, UniformTimesteps

CONFIG = DiffusionConfig(schedule="cosine")
NUMBERS = torch.arange(100, 108)
IMAGES = torch.arange(8 * 3 * 8 * 8).mul(7919).remainder(256).to(torch.uint8).view(8, 3, 8, 8)
LABELS = torch.arange(8) % 5


class Recorder:
    """A net of fixed output that keeps what it was given."""

    def __init__(self, *, classes: int | None = None) -> None:
        self.classes = classes
        self.given: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.given = {"x": x, "t": t, **conditions}
        return torch.cat((x, x), dim=1) if self.classes is None else x.flatten(1)[:, : self.classes]


def denoise(**changes: Any) -> Denoise:
    settings = {
        "timesteps": UniformTimesteps(1000, seed=3),
        "seed": 3,
        "class_conditional": False,
        **changes,
    }
    return Denoise(CONFIG, **settings)


@pytest.mark.parametrize("objective", [denoise(), Classify(CONFIG, seed=3)])
def test_any_split_of_a_batch_gives_the_same_terms(objective: Denoise | Classify) -> None:
    net = Recorder(classes=None if isinstance(objective, Denoise) else 6)
    whole = objective(net, IMAGES, LABELS, NUMBERS)
    noised = net.given["x"]
    for part in (slice(0, 3), slice(3, 8)):
        terms = objective(net, IMAGES[part], LABELS[part], NUMBERS[part])
        assert torch.equal(net.given["x"], noised[part])
        for name, value in terms.items():
            torch.testing.assert_close(value, whole[name][part])


def test_denoise_terms_and_conditions() -> None:
    net = Recorder()
    terms = denoise(class_conditional=True, small_size=2)(net, IMAGES, LABELS, NUMBERS)
    assert set(terms) == {"loss", "unweighted", "t", "mse", "vb"}
    assert terms["t"].dtype == torch.int64 and torch.equal(terms["t"], net.given["t"])
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    assert torch.equal(net.given["y"], LABELS)
    means = F.avg_pool2d(IMAGES.float(), 4) / 127.5 - 1
    torch.testing.assert_close(net.given["low_res"], means)
    denoise()(net, IMAGES, LABELS, NUMBERS)
    assert set(net.given) == {"x", "t"}


def test_labels_are_dropped_by_image_index_alone() -> None:
    objective = denoise(class_conditional=True, label_dropout=0.3)
    net, seen = Recorder(), []
    for part in (slice(0, 3), slice(3, 8)):
        objective(net, IMAGES[part], LABELS[part], NUMBERS[part])
        seen.append(net.given["y"])
    objective(net, IMAGES, LABELS, NUMBERS)
    assert torch.equal(torch.cat(seen), net.given["y"])
    many, labels = torch.arange(20_000), torch.arange(20_000) % 10
    dropped = drop_labels(labels, many, share=0.3, seed=3)
    assert (dropped == NO_LABEL).float().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(dropped[dropped != NO_LABEL], labels[dropped != NO_LABEL])
    assert not torch.equal(dropped, drop_labels(labels, many, share=0.3, seed=4))


def test_classify_counts_the_best_and_the_best_five() -> None:
    net, objective = Recorder(classes=6), Classify(CONFIG, seed=0)
    objective(net, IMAGES, LABELS, NUMBERS)
    logits, place = net.given["x"].flatten(1)[:, :6], torch.arange(8) % 6
    labels = logits.argsort(dim=1, descending=True).gather(1, place[:, None])[:, 0]
    terms = objective(net, IMAGES, labels, NUMBERS)
    assert set(terms) == {"loss", "t", "acc1", "acc5"}
    assert torch.equal(terms["acc1"], (place == 0).float())
    assert torch.equal(terms["acc5"], (place < 5).float())
    torch.testing.assert_close(terms["loss"], F.cross_entropy(logits, labels, reduction="none"))


def test_uniform_timesteps_are_drawn_equally_often() -> None:
    t, weight = UniformTimesteps(7, seed=3).draw(torch.arange(70_000))
    counts = torch.bincount(t)
    assert len(counts) == 7 and ((counts - 10_000).square() / 10_000).sum() < 30
    assert torch.equal(weight, torch.ones(70_000))


def filled(steps: int = 20) -> LossSecondMoment:
    """The last ten losses of a timestep vary about t + 1, more at later ones."""
    sampler = LossSecondMoment(steps, seed=1)
    for round_ in range(12):
        t = torch.arange(steps)
        share = 100 if round_ < 2 else (-1) ** round_ * t / steps
        sampler.update(t, (t + 1) * (1 + share))
    return sampler


def test_second_moment_is_uniform_until_every_history_is_full() -> None:
    sampler = LossSecondMoment(20, seed=1)
    for _ in range(10):
        assert torch.equal(sampler.draw(torch.arange(1000))[1], torch.ones(1000))
        sampler.update(torch.arange(19), torch.ones(19))
    assert torch.equal(sampler.draw(torch.arange(1000))[1], torch.ones(1000))


def test_second_moment_draws_by_the_root_mean_square_without_bias() -> None:
    t, weight = filled().draw(torch.arange(100_000))
    share = torch.bincount(t, minlength=20) / len(t)
    size = (torch.arange(20) + 1) * (1 + (torch.arange(20) / 20).square()).sqrt()
    want = 0.999 * size / size.sum() + 0.001 / 20
    torch.testing.assert_close(share, want, atol=0.005, rtol=0)
    torch.testing.assert_close(weight, 1 / (20 * want[t]))
    assert weight.mean() == pytest.approx(1, abs=0.02)


def test_second_moment_keeps_ten_losses_and_survives_json() -> None:
    sampler, again = filled(), LossSecondMoment(20, seed=1)
    state = sampler.state()
    assert all(len(losses) == 10 for losses in state["losses"])
    again.load(json.loads(json.dumps(state)))
    for one, other in zip(sampler.draw(NUMBERS), again.draw(NUMBERS), strict=True):
        assert torch.equal(one, other)


def test_weighted_loss_is_the_unweighted_one_times_the_weight() -> None:
    timesteps = filled(1000)
    terms = denoise(timesteps=timesteps)(Recorder(), IMAGES, LABELS, NUMBERS)
    t, weight = timesteps.draw(NUMBERS)
    assert torch.equal(terms["t"], t)
    torch.testing.assert_close(terms["loss"], terms["unweighted"] * weight)
