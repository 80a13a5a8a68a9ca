"""Exponential moving averages of the fp32 master weights, as further state of the optimizer.

DeepSpeed-ZeRO hands the base optimizer flat fp32 partitions and steps it only when the gradients
are finite. A hook behind that step therefore sees exactly the weights that this rank owns, costs
1/R of a copy per decay, follows the partitions of stages 1, 2 and 3, and is left alone by a
skipped step. Checkpoints gather the averages as they gather the Adam moments.
"""

from collections.abc import Sequence
from typing import Any

import torch


def key(decay: float) -> str:
    """The name of an average, in the optimizer's state and among a checkpoint's files."""
    return f"ema-{decay}"


def attach(optimizer: torch.optim.Optimizer, *, decays: Sequence[float]) -> None:
    """Update `state[p]["ema-DECAY"]` behind every step: ema <- decay ema + (1 - decay) p.

    The states must hold the averages already (at first, the weights themselves).
    """

    def update(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [p for group in stepped.param_groups for p in group["params"]]
        for decay in decays:
            averages = [stepped.state[p][key(decay)] for p in parameters]
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1.0 - decay)

    optimizer.register_step_post_hook(update)
