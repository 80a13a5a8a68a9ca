"""Averages of the fp32 master weights, as further state of the optimizer.

DeepSpeed-ZeRO hands the base optimizer flat fp32 partitions and steps it only when the gradients
are finite. A hook behind that step therefore sees exactly the weights that this rank owns, costs
1/R of a copy per average, follows the partitions of stages 1, 2 and 3, and is left alone by a
skipped step. Checkpoints gather the averages as they gather the Adam moments.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainer.adm.ema import Average, Exponential, PowerFunction
from trainer.config.sections import TrainingConfig


def exponential(decay: float) -> str:
    """The name of an exponential average, in the optimizer's state and among a run's files."""
    return f"ema-{decay}"


def power(width: float) -> str:
    """The name of a power-function average."""
    return f"power-{width}"


def kept(training: TrainingConfig) -> dict[str, Average]:
    """The averages that a run keeps, by name; grids are drawn from the first."""
    images, warmup = training.ema_images, training.ema_warmup
    averages: dict[str, Average] = {
        exponential(decay): Exponential(decay=decay, images=images, warmup=warmup)
        for decay in training.ema
    }
    return averages | {power(width): PowerFunction(width=width) for width in training.ema_widths}


def described(training: TrainingConfig) -> str:
    """A line for the log about the spans of the exponential averages; "" without any."""
    if training.ema_images is None:
        return "training.ema is per step, whatever the batch: training.ema_images is absent"
    spans = [
        f"{decay} (half-life {training.ema_images * math.log(0.5, decay):,.0f} images)"
        for decay in training.ema
        if decay
    ]
    return f"EMA: {', '.join(spans)}" if spans else ""


def attach(
    optimizer: torch.optim.Optimizer,
    *,
    averages: Mapping[str, Average],
    clock: Callable[[], tuple[int, int]],
) -> None:
    """Update `state[p][NAME]` behind every step; `clock` gives the last update's time and now.

    The states must hold the averages already (at first, the weights themselves).
    """

    def update(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [p for group in stepped.param_groups for p in group["params"]]
        since, now = clock()
        for name, average in averages.items():
            states = [stepped.state[p][name] for p in parameters]
            beta = average.beta(since=since, now=now)
            torch._foreach_lerp_(states, [p.detach() for p in parameters], 1.0 - beta)

    optimizer.register_step_post_hook(update)
