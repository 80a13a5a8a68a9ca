"""The diffusion process: an image becomes a noised one, a net's output becomes a step back.

Paper, section 2 and appendix B. q(x_t | x_0), its posterior, the algebra between noise and
image, what the net's output means, and the training loss. Steps t are indices of this process,
which may be respaced; nets always see the timestep of the full one, `original(t)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from trainer.adm import likelihood
from trainer.adm.config import DiffusionConfig
from trainer.adm.respacing import kept_timesteps

Net = Callable[[Tensor, Tensor], Tensor]
"""(x_t, original timesteps) -> output, with labels and low resolution already bound."""


@dataclass(frozen=True)
class Prediction:
    """p(x_{t-1} | x_t) of a net's output, and the image it expects; each (B, 3, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


class Diffusion:
    """The process of a configuration, all timesteps or respaced (see `kept_timesteps`).

    Public tables are on the CPU: `betas` float64, `timestep_map` int64, each (steps,). The float32
    copies that the methods read go to a device once and stay.
    """

    def __init__(self, config: DiffusionConfig, *, respacing: str | None = None) -> None:
        full = _SCHEDULES[config.schedule]
        kept = kept_timesteps(config.steps, respacing)
        self.config = config
        self.steps = len(kept)
        self.timestep_map = torch.tensor(kept)
        self.betas = _respaced_betas(full(config.steps), kept)
        self._tables = _tables(self.betas)
        self._placed: dict[torch.device, dict[str, Tensor]] = {}

    def original(self, t: Tensor) -> Tensor:
        """The full process's timesteps of steps t, both int64 (B,): what every net is given."""
        return self._on(t.device)["original"][t]

    def at(self, name: str, t: Tensor) -> Tensor:
        """Values of a table at steps t (B,), float32, shaped (B, 1, 1, 1)."""
        return self._on(t.device)[name][t][:, None, None, None]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), (B, C, H, W): x0 after t + 1 steps of noising, t (B,)."""
        return self.at("sqrt_alpha_bar", t) * x0 + self.at("sqrt_one_minus_alpha_bar", t) * noise

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0), (B, C, H, W), at steps t (B,)."""
        return self.at("posterior_x0", t) * x0 + self.at("posterior_xt", t) * x_t

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The image (B, C, H, W) that noise eps made x_t of, at steps t (B,)."""
        return self.at("sqrt_recip", t) * x_t - self.at("sqrt_recip_minus_one", t) * eps

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise (B, C, H, W) that made x_t of image x0, at steps t (B,)."""
        return (self.at("sqrt_recip", t) * x_t - x0) / self.at("sqrt_recip_minus_one", t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the net learns to predict (B, C, H, W), of images x0 noised to steps t (B,)."""
        predict = self.config.predict
        if predict == "eps":
            return noise
        if predict == "x0":
            return x0
        assert_never(predict)

    def _image(self, value: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image (B, C, H, W) that a prediction means: x0, if `value` is the `target`."""
        predict = self.config.predict
        if predict == "eps":
            return self.x0_from_eps(x_t, t, value)
        if predict == "x0":
            return value
        assert_never(predict)

    def p_mean_variance(self, out: Tensor, x_t: Tensor, t: Tensor, *, clip: bool) -> Prediction:
        """What a net's output (B, 3 or 6, H, W) says of x_{t-1}; `clip` keeps x0 in [-1, 1]."""
        value, log_variance = self._read(out, t)
        x0 = self._image(value, x_t, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        return Prediction(
            mean=self.q_posterior_mean(x0, x_t, t),
            variance=log_variance.exp().expand_as(x_t),
            log_variance=log_variance.expand_as(x_t),
            x0=x0,
        )

    def losses(
        self, out: Tensor, *, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Terms per image (B,) for a net's output at x_t: "loss", "mse" and "vb" as they apply.

        "vb" is in bits per dimension and already scaled as it enters "loss".
        """
        loss, terms = self.config.loss, {}
        if not loss.startswith("vlb"):
            error = self.target(x0, noise, t) - out[:, :3]
            terms["mse"] = likelihood.mean_flat(error.square())
        if loss != "simple":
            # The learned variance must not pull at the mean in a hybrid loss.
            seen = (
                out if loss.startswith("vlb") else torch.cat((out[:, :3].detach(), out[:, 3:]), 1)
            )
            bits = self.vb_bits(self.p_mean_variance(seen, x_t, t, clip=False), x0=x0, x_t=x_t, t=t)
            scale = {"hybrid_rescaled": self.steps / 1000, "vlb_rescaled": self.steps}
            terms["vb"] = bits * scale.get(loss, 1)
        return {"loss": torch.stack(list(terms.values())).sum(0), **terms}

    def vb_bits(self, p: Prediction, *, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound per image (B,), in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p), and at t = 0 the negative log-likelihood of the pixels.
        """
        mean = self.q_posterior_mean(x0, x_t, t)
        kl = likelihood.normal_kl(
            mean, self.at("posterior_log_variance", t), p.mean, p.log_variance
        )
        nll = -likelihood.pixel_log_likelihood(x0, mean=p.mean, log_deviation=0.5 * p.log_variance)
        return likelihood.bits(torch.where((t == 0)[:, None, None, None], nll, kl))

    def prior_bits(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) per image (B,), in bits per dimension."""
        last = torch.full((len(x0),), self.steps - 1, device=x0.device)
        mean = self.at("sqrt_alpha_bar", last) * x0
        log_variance = self.at("log_one_minus_alpha_bar", last)
        zero = torch.zeros_like(log_variance)
        return likelihood.bits(likelihood.normal_kl(mean, log_variance, zero, zero))

    def _read(self, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A net's output as its prediction and the log variance."""
        if self.config.variance != "learned":
            assert out.shape[1] == 3, "a fixed variance has an output of 3 channels"
            return out, self.at(self.config.variance, t)
        assert out.shape[1] == 6, "a learned variance has an output of 6 channels"
        value, place = out.chunk(2, dim=1)
        share = (place + 1) / 2
        low, high = self.at("posterior_log_variance", t), self.at("log_beta", t)
        return value, share * high + (1 - share) * low

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._placed:
            self._placed[device] = {
                "original": self.timestep_map.to(device),
                **{name: table.float().to(device) for name, table in self._tables.items()},
            }
        return self._placed[device]


@torch.no_grad()
def bits_per_dimension(
    diffusion: Diffusion, net: Net, x0: Tensor, *, noise: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """The variational bound of images x0 (B, 3, H, W), in bits per dimension.

    Visits every step; `noise(i)` is the noise of x_i, shaped as x0. Returns "total"
    (B,), its parts "vb" (B, steps) and "prior" (B,), and "mse" (B, steps) of the noise predicted.
    """
    terms: dict[str, list[Tensor]] = {"vb": [], "mse": []}
    for i in range(diffusion.steps):
        t = torch.full((len(x0),), i, device=x0.device)
        drawn = noise(i)
        x_t = diffusion.q_sample(x0, t, drawn)
        p = diffusion.p_mean_variance(net(x_t, diffusion.original(t)), x_t, t, clip=True)
        terms["vb"].append(diffusion.vb_bits(p, x0=x0, x_t=x_t, t=t))
        eps = diffusion.eps_from_x0(x_t, t, p.x0)
        terms["mse"].append(likelihood.mean_flat((eps - drawn).square()))
    vb, mse = (torch.stack(terms[name], dim=1) for name in ("vb", "mse"))
    prior = diffusion.prior_bits(x0)
    return {"total": vb.sum(1) + prior, "vb": vb, "prior": prior, "mse": mse}


def _linear_betas(steps: int) -> Tensor:
    """(steps,) from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020), scaled for others."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def _cosine_betas(steps: int) -> Tensor:
    """(steps,), at most 0.999: alpha_bar(s) = cos^2(pi/2 (s + .008) / 1.008) (Nichol, Dhariwal)."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


_SCHEDULES = {"linear": _linear_betas, "cosine": _cosine_betas}


def _respaced_betas(betas: Tensor, kept: list[int]) -> Tensor:
    """Betas (len(kept),) of the process that visits only `kept`, with its alpha_bar there."""
    alpha_bar = (1 - betas).cumprod(0)[kept]
    return 1 - alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))


def _tables(betas: Tensor) -> dict[str, Tensor]:
    """Every coefficient per step, float64; the two fixed variances are log variances."""
    alpha_bar = (1 - betas).cumprod(0)
    before = torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
    posterior = betas * (1 - before) / (1 - alpha_bar)
    # The posterior has no variance at step 0, where its logarithm would be infinite.
    positive = torch.cat((posterior[1:2], posterior[1:]))
    return {
        "alpha_bar": alpha_bar,
        "alpha_bar_before": before,
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        "log_one_minus_alpha_bar": (1 - alpha_bar).log(),
        "sqrt_recip": (1 / alpha_bar).sqrt(),
        "sqrt_recip_minus_one": (1 / alpha_bar - 1).sqrt(),
        "posterior_x0": betas * before.sqrt() / (1 - alpha_bar),
        "posterior_xt": (1 - before) * (1 - betas).sqrt() / (1 - alpha_bar),
        "posterior_log_variance": positive.log(),
        "log_beta": betas.log(),
        "fixed_small": positive.log(),
        "fixed_large": torch.cat((posterior[1:2], betas[1:])).log(),
    }
