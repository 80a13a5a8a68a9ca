"""Schedules, losses, sampling steps and likelihoods against recorded values; and their algebra."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import golden
from trainer.adm import likelihood, sampler
from trainer.adm.config import DiffusionConfig
from trainer.adm.diffusion import Diffusion, Prediction, bits_per_dimension
from trainer.adm.respacing import kept_timesteps

CASES = {case["name"]: case for case in golden.table("cases")["diffusions"]}
WANT = golden.tensors("diffusion")
SHAPE = (4, 3, 8, 8)


class Process:
    """One recorded case with its inputs."""

    def __init__(self, name: str) -> None:
        case = CASES[name]
        learned = case["learn_sigma"]
        config = DiffusionConfig(
            steps=case["steps"],
            schedule=case["noise_schedule"],
            variance="learned" if learned else "fixed_large",
            loss="hybrid" if learned else "simple",
        )
        self.name, self.channels = name, 6 if learned else 3
        self.diffusion = Diffusion(config, respacing=case["timestep_respacing"] or None)
        steps = self.diffusion.steps
        self.t = torch.tensor([0, 1, steps // 2, steps - 1])
        self.x0, self.eps = self.wave("x0", 0.9), self.wave("eps", 1.3)
        self.x_t = self.diffusion.q_sample(self.x0, self.t, self.eps)
        self.out = self.toy(self.x_t, self.diffusion.original(self.t))

    def wave(self, name: str, scale: float) -> Tensor:
        return golden.wave(f"{name}:{self.name}", SHAPE, scale)

    def toy(self, x: Tensor, t: Tensor) -> Tensor:
        weight = golden.wave("toy.weight", (self.channels, 3, 3, 3), 0.4)
        time = torch.sin(t / 100)[:, None] * golden.wave("toy.time", (self.channels,), 0.3)
        return F.conv2d(x, weight, padding=1) + time[:, :, None, None]

    def prediction(self) -> Prediction:
        return self.diffusion.p_mean_variance(self.out, self.x_t, self.t, clip=True)

    def check(self, quantity: str, got: Tensor, *, tolerance: float = 1e-4) -> None:
        golden.assert_close(got, WANT[f"{self.name}.{quantity}"], tolerance=tolerance)


@pytest.fixture(params=CASES)
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    yield Process(request.param)


def test_schedule(process: Process) -> None:
    process.check("betas", process.diffusion.betas, tolerance=1e-12)
    alpha_bar = (1 - process.diffusion.betas).cumprod(0)
    process.check("alphas_cumprod", alpha_bar, tolerance=1e-12)
    assert torch.equal(process.diffusion.timestep_map, WANT[f"{process.name}.timestep_map"])


def test_losses(process: Process) -> None:
    process.check("q_sample", process.x_t)
    terms = process.diffusion.losses(
        process.out, x0=process.x0, x_t=process.x_t, noise=process.eps, t=process.t
    )
    for name, value in terms.items():
        process.check(f"loss.{name}", value)


def test_prediction(process: Process) -> None:
    p = process.prediction()
    process.check("p.mean", p.mean)
    process.check("p.variance", p.variance)
    process.check("p.log_variance", p.log_variance)
    process.check("p.pred_xstart", p.x0)


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_steps(process: Process, guided: bool) -> None:
    p, prefix = process.prediction(), "guided_" if guided else ""
    gradient = process.wave("cond", 0.5) if guided else None
    noise = process.wave("z", 1.1) * (process.t > 0)[:, None, None, None]
    got = sampler.ancestral_step(p, noise=noise, gradient=gradient)
    process.check(f"{prefix}ddpm", got)
    for eta in (0, 1):
        got = sampler.ddim_step(
            process.diffusion, p, process.x_t, process.t, eta=eta, noise=noise, gradient=gradient
        )
        process.check(f"{prefix}ddim_eta{eta}", got)


@pytest.mark.parametrize("name", ["linear1000", "cosine1000_resp25", "linear_ddim10"])
def test_bits_per_dimension(name: str) -> None:
    process = Process(name)
    noise = process.wave("z", 1.1)
    got = bits_per_dimension(process.diffusion, process.toy, process.x0, noise=lambda i: noise)
    process.check("total_bpd", got["total"])
    process.check("prior_bpd", got["prior"])


def test_the_error_by_step_is_that_of_the_noise_predicted() -> None:
    process = Process("linear_ddim10")
    noise = process.wave("z", 1.1)

    out = torch.cat((noise + 0.01, torch.zeros_like(noise)), dim=1)[:, : process.channels]
    given = {"noise": lambda i: noise}
    got = bits_per_dimension(process.diffusion, lambda x, t: out, 0.1 * process.x0, **given)
    # In the last steps that error would be an image beyond black and white, which is clipped.
    assert got["mse"][:, :8].flatten().tolist() == pytest.approx([1e-4] * 4 * 8, rel=0.02)
    torch.testing.assert_close(got["total"], got["vb"].sum(1) + got["prior"])


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5, 20.0])
def test_all_grey_levels_together_are_certain(deviation: float) -> None:
    """The outermost ones, of which images have many, hold what is beyond them."""
    levels = (torch.arange(256) / 127.5 - 1)[:, None]
    mean = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.123, 1.0, 3.0]).expand(256, -1)
    spread = torch.full_like(mean, deviation)
    found = likelihood.pixel_log_likelihood(
        levels.expand_as(mean), mean=mean, log_deviation=spread.log()
    )
    torch.testing.assert_close(found.exp().sum(0), torch.ones(7), rtol=1e-4, atol=0)
    assert found.isfinite().all()


def test_eps_and_x0_are_two_names_of_one_prediction() -> None:
    process = Process("linear1000")
    config = DiffusionConfig(schedule="linear", predict="x0")
    x0 = process.diffusion.x0_from_eps(process.x_t, process.t, process.out[:, :3])
    out = torch.cat((x0, process.out[:, 3:]), dim=1)
    got = Diffusion(config).p_mean_variance(out, process.x_t, process.t, clip=True)
    golden.assert_close(got.mean, process.prediction().mean, tolerance=1e-5)
    perfect = torch.cat((process.x0, process.out[:, 3:]), dim=1)
    given = {"x0": process.x0, "x_t": process.x_t, "noise": process.eps, "t": process.t}
    assert not Diffusion(config).losses(perfect, **given)["mse"].any()


def test_the_perfect_net_has_no_loss_and_the_bound_is_tight() -> None:
    diffusion = Diffusion(DiffusionConfig(schedule="cosine", variance="fixed_small", loss="vlb"))
    x0 = golden.wave("x", SHAPE, 0.9)
    t = torch.tensor([1, 10, 500, 999])
    noise = golden.wave("n", SHAPE, 1.0)
    x_t = diffusion.q_sample(x0, t, noise)
    terms = diffusion.losses(noise, x0=x0, x_t=x_t, noise=noise, t=t)
    assert terms["loss"].abs().max() < 1e-4


def test_a_fixed_small_variance_is_that_of_the_posterior() -> None:
    diffusion = Diffusion(DiffusionConfig(schedule="cosine", variance="fixed_small", loss="vlb"))
    betas = diffusion.betas
    alpha_bar = (1 - betas).cumprod(0)
    posterior = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    x, t = golden.wave("x", (1000, 3, 1, 1), 0.9), torch.arange(1000)
    found = diffusion.p_mean_variance(x, x, t, clip=True).variance[:, 0, 0, 0]
    # At step 0 it is 0, for which that of step 1 stands.
    torch.testing.assert_close(
        found, torch.cat((posterior[:1], posterior)).float(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_linear_betas_make_the_same_noise_in_any_number_of_steps(steps: int) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule="linear", steps=steps))
    first, last = (steps * diffusion.betas[[0, -1]]).tolist()
    assert (first, last) == pytest.approx((0.1, 20))


@pytest.mark.parametrize("loss", ["vlb", "vlb_rescaled", "hybrid", "hybrid_rescaled"])
def test_only_the_pure_bound_trains_the_mean_through_vb(loss: Any) -> None:
    process = Process("linear1000")
    diffusion = Diffusion(DiffusionConfig(schedule="linear", loss=loss))
    out = process.out.clone().requires_grad_()
    terms = diffusion.losses(out, x0=process.x0, x_t=process.x_t, noise=process.eps, t=process.t)
    assert torch.isfinite(terms["loss"]).all()
    assert ("mse" in terms) == loss.startswith("hybrid")
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), out)
    assert bool(gradient[:, :3].any()) == loss.startswith("vlb")
    assert gradient[:, 3:].any()


@pytest.mark.parametrize(("loss", "by"), [("vlb", 4000), ("hybrid", 4)])
def test_rescaled_losses_are_multiples(loss: Any, by: int) -> None:
    """Of 4000 steps: of the sum over them, and of what 1000 steps would weigh."""
    process, vb = Process("linear1000"), []
    names: tuple[Any, ...] = (loss, f"{loss}_rescaled")
    for name in names:
        diffusion = Diffusion(DiffusionConfig(schedule="linear", steps=4000, loss=name))
        given = {"x0": process.x0, "x_t": process.x_t, "noise": process.eps, "t": process.t}
        terms = diffusion.losses(process.out, **given)
        vb.append(terms["vb"])
        torch.testing.assert_close(terms["loss"], terms["vb"] + terms.get("mse", 0))
    torch.testing.assert_close(vb[1], by * vb[0])


@pytest.mark.parametrize(
    ("respacing", "count"),
    [(None, 1000), ("250", 250), ("90,60,60,20,20", 250), ("1000", 1000), ("ddim25", 25)],
)
def test_respacing(respacing: str | None, count: int) -> None:
    kept = kept_timesteps(1000, respacing)
    assert len(kept) == len(set(kept)) == count
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] < 1000
    if respacing == "90,60,60,20,20":
        assert [sum(200 * i <= t < 200 * i + 200 for t in kept) for i in range(5)] == [
            90, 60, 60, 20, 20,
        ]  # fmt: skip
        # Of sections that cannot be equal the first are longer by one.
        assert kept_timesteps(10, "3,2,2") == [0, 2, 3, 4, 6, 7, 9]


@pytest.mark.parametrize("steps", [1000, 4000])
def test_timesteps_are_those_that_sums_of_the_stride_round_to(steps: int) -> None:
    """As the published samplers have them; 21 times the stride, say, is another number."""
    for count in range(2, 301):
        strides = np.full(count, (steps - 1) / (count - 1))
        strides[0] = 0
        assert kept_timesteps(steps, str(count)) == np.rint(np.cumsum(strides)).tolist()


@pytest.mark.parametrize(
    "respacing", ["", "fast", "1001", "ddim26x", "ddim300", "ddim5,5", "0", "1", "-3", "600,100"]
)
def test_impossible_respacing_is_refused_by_name(respacing: str) -> None:
    with pytest.raises(ValueError, match="respacing = "):
        kept_timesteps(1000, respacing)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 10}, "diffusion.steps = 10"),
        ({"variance": "fixed_large"}, "diffusion.loss = 'hybrid'"),
        ({"loss": "simple"}, "leaves untrained"),
        ({"schedule": "cosin"}, "diffusion.schedule = 'cosin'"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DiffusionConfig(**{"schedule": "linear", **wrong})
