"""Sampling: noise goes in, and step by step an image comes out.

Ancestral sampling (paper, Algorithm 1) and DDIM (Algorithm 2; Song et al. 2020). A guidance is a
function handed in: (x_t, original timesteps) -> the gradient of log p(y | x_t), already scaled.
Samplers yield after every step, so a caller can show progress.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from trainer.adm import keyed
from trainer.adm.config import NO_LABEL, GuideAt
from trainer.adm.diffusion import Diffusion, Net, Prediction

Guidance = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
"""Step -> the standard normal noise that it adds, shaped as the images."""


def ancestral(
    diffusion: Diffusion,
    net: Net,
    x: Tensor,
    *,
    noise: Noise,
    guidance: Guidance | None = None,
    guide_at: GuideAt = "x_t",
    clip: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Draws x_{t-1} ~ p(x_{t-1} | x_t) from the last step down to 0; x (B, 3, H, W) is pure noise.

    Yields (step, images after it). `clip` keeps every expected image in [-1, 1].
    """
    for i in reversed(range(diffusion.steps)):
        t = _everywhere(i, x)
        p = predict(diffusion, net, x, t, clip=clip)
        gradient = None
        if guidance is not None and guide_at == "x_t":
            gradient = guidance(x, diffusion.original(t))
        elif guidance is not None:
            gradient = guidance(p.mean, diffusion.original((t - 1).clamp(min=0)))
        x = ancestral_step(p, noise=noise(i) if i > 0 else None, gradient=gradient)
        yield i, x


def ddim(
    diffusion: Diffusion,
    net: Net,
    x: Tensor,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    guidance: Guidance | None = None,
    clip: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """As `ancestral` by DDIM: without noise at `eta` 0, as much as ancestral at 1.

    Raises:
        ValueError: `eta` above 0 without `noise`.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta = {eta}: adds noise, so give `noise`; or set eta = 0")
    for i in reversed(range(diffusion.steps)):
        t = _everywhere(i, x)
        p = predict(diffusion, net, x, t, clip=clip)
        gradient = guidance(x, diffusion.original(t)) if guidance is not None else None
        drawn = noise(i) if noise is not None and eta > 0 and i > 0 else None
        x = ddim_step(diffusion, p, x, t, eta=eta, noise=drawn, gradient=gradient)
        yield i, x


def classifier_guidance(classifier: Net, labels: Tensor, *, scale: float) -> Guidance:
    """scale * grad log p(labels | x_t) of a classifier trained on noised images (section 4.1)."""

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = log_softmax(classifier(x, t).float(), dim=1)
            chosen = log_p.gather(1, labels[:, None]).sum()
            return torch.autograd.grad(chosen, x)[0] * scale

    return gradient


def classifier_free(net: Callable[..., Tensor], labels: Tensor, *, scale: float) -> Net:
    """The net with its difference that labels (B,) make, from no labels on, times `scale`.

    Ho & Salimans 2022, with their 1 + w as `scale`, for a net(x, t, labels) that was trained on
    dropped labels; 1 is the net with labels. The variance is that of the net with labels.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        known, free = net(x, t, labels), net(x, t, torch.full_like(labels, NO_LABEL))
        channels = x.shape[1]
        moved = free[:, :channels] + scale * (known[:, :channels] - free[:, :channels])
        return torch.cat((moved, known[:, channels:]), dim=1)

    return guided


def start(indices: Tensor, *, seed: int, shape: tuple[int, ...], stage: int = 0) -> Tensor:
    """The pure noise that sampling each image starts from: indices (B,) -> (B, *shape).

    Networks that draw one after the other share no noise if each has its own `stage`.
    """
    stream = keyed.SAMPLE_START + (stage << 32)
    return keyed.normal(indices, seed=seed, stream=stream, shape=shape)


def step_noise(indices: Tensor, *, seed: int, shape: tuple[int, ...], stage: int = 0) -> Noise:
    """Indices (B,) -> step -> noise (B, *shape), the same for any batching of the images."""

    def noise(step: int) -> Tensor:
        stream = keyed.SAMPLE_STEP + step + (stage << 32)
        return keyed.normal(indices, seed=seed, stream=stream, shape=shape)

    return noise


def ancestral_step(p: Prediction, *, noise: Tensor | None, gradient: Tensor | None) -> Tensor:
    """x_{t-1}, (B, C, H, W); guided, its mean is moved by variance * gradient (Algorithm 1)."""
    mean = p.mean if gradient is None else p.mean + p.variance * gradient
    return mean if noise is None else mean + torch.exp(0.5 * p.log_variance) * noise


def ddim_step(
    diffusion: Diffusion,
    p: Prediction,
    x_t: Tensor,
    t: Tensor,
    *,
    eta: float,
    noise: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """x_{t-1}, (B, C, H, W), by DDIM; guided, eps moves by -sqrt(1 - alpha_bar) grad (Alg. 2)."""
    x0, eps = p.x0, diffusion.eps_from_x0(x_t, t, p.x0)
    if gradient is not None:
        eps = eps - diffusion.at("sqrt_one_minus_alpha_bar", t) * gradient
        x0 = diffusion.x0_from_eps(x_t, t, eps)
    now, before = diffusion.at("alpha_bar", t), diffusion.at("alpha_bar_before", t)
    sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
    # From 0: at eta 1 and in few steps it may be smaller than its rounding error.
    rest = (1 - before - sigma.square()).clamp(min=0)
    mean = before.sqrt() * x0 + rest.sqrt() * eps
    return mean if noise is None else mean + sigma * noise


@torch.no_grad()
def predict(diffusion: Diffusion, net: Net, x: Tensor, t: Tensor, *, clip: bool) -> Prediction:
    """What the net says of x_{t-1} at x (B, 3, H, W) and steps t (B,)."""
    return diffusion.p_mean_variance(net(x, diffusion.original(t)), x, t, clip=clip)


def _everywhere(step: int, x: Tensor) -> Tensor:
    """The step index of every image of x, int64 (B,)."""
    return torch.full((len(x),), step, device=x.device)
