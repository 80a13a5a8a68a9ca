"""What DeepSpeed does for every parameter in every micro-batch, left out where it says nothing.

At the paper's batch on many GPUs a micro-batch has few images, and the host limits: it calls a
hook for each of hundreds of parameters. Losses and weights stay the same bits.
"""

import sys
from typing import Any


def take(optimizer: Any, *, stage: int) -> None:
    """Let a ZeRO optimizer of DeepSpeed's take them."""
    # Every parameter has a gradient in every backward pass; DeepSpeed asks autograd for each.
    setattr(sys.modules[type(optimizer).__module__], "count_used_parameters_in_backward", len)  # noqa: B010
    # It writes lines that are not shown.
    optimizer.report_ipg_memory_usage = lambda *_, **__: None
    if stage == 3:
        return
    # The weights are views of one flat tensor, and stay so.
    optimizer._update_model_bit16_weights = lambda _: None
    if optimizer.use_multi_rank_bucket_allreduce:
        # A bucket goes to all ranks in one piece either way, here without a copy of it.
        optimizer.reduce_scatter = optimizer.postscale_gradients = False
