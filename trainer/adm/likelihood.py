"""Gaussian likelihoods: what the terms of the variational bound are made of.

Paper, section 2; Nichol & Dhariwal 2021 for the likelihood of 8-bit pixels. All in nats per
element until `bits` takes the mean over an image's elements.
"""

import math

import torch
from torch import Tensor

_HALF_PIXEL = 1 / 255
"""Half the distance of neighbouring 8-bit values in [-1, 1]."""


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the first dimension: (B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def bits(nats: Tensor) -> Tensor:
    """Nats per element (B, ...) -> bits per dimension (B,)."""
    return mean_flat(nats) / math.log(2)


def normal_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(other)), elementwise."""
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    # Near zero the sum cancels, so its order decides the digits: this is the published one.
    return 0.5 * (-1 - ratio + ratio.exp() + distance)


def pixel_log_likelihood(x: Tensor, *, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log of the Gaussian's mass in the 8-bit bin around x in [-1, 1]; all of one shape.

    The outermost bins reach to infinity.
    """
    scale = torch.exp(-log_deviation)
    below_upper = _normal_cdf(scale * (x - mean + _HALF_PIXEL))
    below_lower = _normal_cdf(scale * (x - mean - _HALF_PIXEL))
    below_upper = torch.where(x > 0.999, 1.0, below_upper)
    below_lower = torch.where(x < -0.999, 0.0, below_lower)
    return (below_upper - below_lower).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the published likelihoods were computed with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
