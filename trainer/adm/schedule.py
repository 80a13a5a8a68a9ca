"""How much noise each timestep holds, and which timesteps a shorter walk keeps.

Everything is float64 on the CPU and computed once; `diffusion.Diffusion` makes its tables of it.
"""

import math

import torch
from torch import Tensor


def linear_betas(steps: int) -> Tensor:
    """From 1e-4 to 0.02 for 1000 steps (Ho et al. 2020), scaled for other numbers of steps."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> Tensor:
    """alpha_bar(s) = cos^2(pi/2 (s + .008) / 1.008) (Nichol & Dhariwal 2021); at most 0.999."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def kept_timesteps(steps: int, respacing: str | None) -> list[int]:
    """The timesteps out of range(steps) that a respaced walk visits, ascending.

    `respacing` is None for all; "250" for so many, evenly spaced; "90,60,60,20,20" for so many
    in each of equal sections; "ddim25" for so many with one integer stride, from timestep 0.

    Raises:
        ValueError: the text is none of these, or cannot be met with `steps` timesteps.
    """
    if respacing is None:
        return list(range(steps))
    ddim = respacing.startswith("ddim")
    try:
        counts = [int(part) for part in respacing.removeprefix("ddim").split(",")]
    except ValueError:
        raise _refusal(respacing, 'write "250", "90,60,60,20,20" or "ddim25"') from None
    if min(counts) < 1 or sum(counts) < 2:
        raise _refusal(respacing, "every count must be at least 1, their sum at least 2")
    if not ddim:
        return _by_sections(steps, counts, respacing)
    if len(counts) > 1:
        raise _refusal(respacing, 'give one number after "ddim"')
    return _by_stride(steps, counts[0], respacing)


def respaced_betas(betas: Tensor, kept: list[int]) -> Tensor:
    """Betas of the walk that visits only `kept`, with the same alpha_bar at each of them."""
    alpha_bar = (1 - betas).cumprod(0)[kept]
    return 1 - alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))


def _by_stride(steps: int, count: int, respacing: str) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise _refusal(respacing, f"no integer stride over {steps} timesteps gives {count}")


def _by_sections(steps: int, counts: list[int], respacing: str) -> list[int]:
    kept, start = [], 0
    size, longer = divmod(steps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise _refusal(respacing, f"a section of {length} timesteps cannot give {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(i * stride) for i in range(count)]
        start += length
    return kept


def _refusal(respacing: str, way_out: str) -> ValueError:
    return ValueError(f"respacing = {respacing!r}: {way_out}")
