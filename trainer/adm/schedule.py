"""How much noise each timestep holds, of all of them or of those that respaced sampling keeps.

Everything is float64 on the CPU and computed once; `diffusion.Diffusion` makes its tables of it.
"""

import math

import torch
from torch import Tensor


def linear_betas(steps: int) -> Tensor:
    """(steps,) from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020), scaled for others."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> Tensor:
    """(steps,), at most 0.999: alpha_bar(s) = cos^2(pi/2 (s + .008) / 1.008) (Nichol, Dhariwal)."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def respaced_betas(betas: Tensor, kept: list[int]) -> Tensor:
    """Betas (len(kept),) of the process that visits only `kept`, with its alpha_bar there."""
    alpha_bar = (1 - betas).cumprod(0)[kept]
    return 1 - alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
