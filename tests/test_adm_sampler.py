"""The walks: a perfect net recovers its image; noise and guidance enter as the paper says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import golden
from trainer.adm import sampler
from trainer.adm.config import DiffusionConfig
from trainer.adm.diffusion import Diffusion, Net

SHAPE = (3, 8, 8)
NUMBERS = torch.arange(4)
X0 = golden.wave("image", (4, *SHAPE), 0.9)


def process(respacing: str | None) -> Diffusion:
    config = DiffusionConfig(schedule="linear", variance="fixed_small", loss="simple")
    return Diffusion(config, respacing=respacing)


def knows(x0: Tensor) -> Net:
    """A net that predicts exactly the noise that leads back to x0, by original timesteps."""
    full = process(None)
    return lambda x, t: full.eps_from_x0(x, t, x0)


def last(walk: Any) -> Tensor:
    *_, (_, x) = walk
    assert not x.requires_grad
    return x


def begin() -> tuple[Tensor, sampler.Noise]:
    start = sampler.start(NUMBERS, seed=0, shape=SHAPE)
    return start, sampler.step_noise(NUMBERS, seed=0, shape=SHAPE)


@pytest.mark.parametrize("respacing", ["50", "ddim25", "10,5,5", "2"])
def test_a_perfect_net_recovers_its_image(respacing: str) -> None:
    diffusion = process(respacing)
    start, noise = begin()
    for walk in (
        sampler.ancestral(diffusion, knows(X0), start, noise=noise),
        sampler.ddim(diffusion, knows(X0), start),
        sampler.ddim(diffusion, knows(X0), start, noise=noise, eta=1.0),
    ):
        golden.assert_close(last(walk), X0, tolerance=1e-3)


@pytest.mark.parametrize("walk", [sampler.ancestral, sampler.ddim])
def test_expected_images_are_clipped_unless_told_otherwise(walk: Any) -> None:
    (start, noise), beyond = begin(), 3 * X0
    clipped = last(walk(process("10"), knows(beyond), start, noise=noise))
    golden.assert_close(clipped, beyond.clamp(-1, 1), tolerance=1e-3)
    free = last(walk(process("10"), knows(beyond), start, noise=noise, clip=False))
    golden.assert_close(free, beyond, tolerance=1e-3)


def test_the_walk_reports_every_step_and_nets_see_original_timesteps() -> None:
    diffusion, seen = process("ddim10"), []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return x

    steps = [step for step, _ in sampler.ddim(diffusion, net, begin()[0])]
    assert steps == list(reversed(range(10)))
    assert seen == list(reversed(range(0, 1000, 100)))


def test_each_image_is_the_same_in_any_batch() -> None:
    def draw(numbers: Tensor) -> Tensor:
        start = sampler.start(numbers, seed=5, shape=SHAPE)
        noise = sampler.step_noise(numbers, seed=5, shape=SHAPE)
        return last(sampler.ancestral(process("10"), lambda x, t: 0.1 * x, start, noise=noise))

    assert torch.equal(draw(NUMBERS), torch.cat((draw(NUMBERS[:1]), draw(NUMBERS[1:]))))


def test_ancestral_and_ddim_share_the_statistics_of_gaussian_data() -> None:
    deviation, full = 0.5, process(None)

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = full.at("alpha_bar", t)
        return x * (1 - alpha_bar).sqrt() / (alpha_bar * deviation**2 + 1 - alpha_bar)

    numbers = torch.arange(64)
    start = sampler.start(numbers, seed=0, shape=SHAPE)
    noise = sampler.step_noise(numbers, seed=0, shape=SHAPE)
    for walk in (
        sampler.ancestral(process("250"), net, start, noise=noise, clip=False),
        sampler.ddim(process("250"), net, start, clip=False),
        sampler.ddim(process("250"), net, start, noise=noise, eta=1.0, clip=False),
    ):
        assert last(walk).std() == pytest.approx(deviation, rel=0.03)


def test_guidance_is_the_scaled_gradient_at_original_timesteps() -> None:
    labels, seen = torch.tensor([0, 1, 2, 0]), []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return x.mean(dim=(2, 3))

    guidance = sampler.classifier_guidance(classifier, labels, scale=3.0)
    x = golden.wave("x", (4, *SHAPE), 1.0)
    p = x.mean(dim=(2, 3)).softmax(dim=1)
    want = 3.0 / 64 * (torch.nn.functional.one_hot(labels, 3) - p)
    got = guidance(x, torch.full((4,), 7))
    torch.testing.assert_close(got, want[:, :, None, None].expand_as(x))
    last(sampler.ancestral(process("ddim10"), lambda x, t: x, x, noise=begin()[1],
                           guidance=guidance))  # fmt: skip
    assert seen[1:] == list(reversed(range(0, 1000, 100)))


@pytest.mark.parametrize("walk", ["ancestral", "ddim"])
def test_guidance_moves_samples_up_the_gradient(walk: str) -> None:
    start, noise = begin()
    given: dict[str, Any] = {"noise": noise} if walk == "ancestral" else {}

    def draw(guidance: sampler.Guidance | None) -> Tensor:
        net: Net = lambda x, t: 0.5 * x  # noqa: E731
        step = getattr(sampler, walk)
        return last(step(process("10"), net, start, guidance=guidance, clip=False, **given))

    assert (draw(lambda x, t: torch.ones_like(x)) > draw(None)).all()


def test_noisy_ddim_needs_noise() -> None:
    with pytest.raises(ValueError, match=r"eta = 0\.5"):
        next(sampler.ddim(process("10"), knows(X0), begin()[0], eta=0.5))


def test_guidance_at_the_mean_is_the_gradient_there_one_step_on() -> None:
    diffusion, seen = process("10"), []
    start, noise = begin()

    def guidance(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, int(t[0])))
        return torch.ones_like(x)

    net = knows(X0)
    steps = [x for _, x in sampler.ancestral(diffusion, net, start, noise=noise,
                                             guidance=guidance, guide_at="mean")]  # fmt: skip
    kept = diffusion.original(torch.arange(10)).tolist()
    assert [t for _, t in seen] == [*reversed(kept[:-1]), kept[0]]
    first = sampler.predict(diffusion, net, start, torch.full((len(start),), 9), clip=True)
    assert torch.equal(seen[0][0], first.mean)
    want = sampler.ancestral_step(first, noise=noise(9), gradient=torch.ones_like(start))
    assert torch.equal(steps[0], want)


def test_classifier_free_guidance_moves_the_prediction_away_from_that_without_labels() -> None:
    labels = torch.tensor([2, 0, 1, 2])

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x * y[:, None, None, None], x + y[:, None, None, None]), dim=1)

    x, t = golden.wave("x", (4, *SHAPE), 1.0), torch.full((4,), 7)
    known, free = net(x, t, labels), net(x, t, torch.full((4,), -1))
    for scale in (0.0, 1.0, 3.5):
        got = sampler.classifier_free(net, labels, scale=scale)(x, t)
        want = free[:, :3] + scale * (known - free)[:, :3]
        torch.testing.assert_close(got[:, :3], want)
        assert torch.equal(got[:, 3:], known[:, 3:])


def test_two_stages_share_no_noise() -> None:
    large = (3, 16, 16)
    for draw in (
        sampler.start,
        lambda *a, **k: sampler.step_noise(*a, **k)(3),
    ):
        base = draw(NUMBERS, seed=0, shape=SHAPE)
        assert torch.equal(base, draw(NUMBERS, seed=0, shape=SHAPE, stage=0))
        second = draw(NUMBERS, seed=0, shape=large, stage=16).flatten(1)[:, : base[0].numel()]
        together = torch.stack((base.flatten(), second.flatten()))
        assert abs(float(torch.corrcoef(together)[0, 1])) < 0.1
