"""Norms of gradients and of weights.

The gradient norm of DeepSpeed's step is of all tensors at once, with the overflow read from it.

DeepSpeed looks at every gradient twice, with a dozen small operations each: for infinities, then
for the norm. A norm that is not finite says the same, and DeepSpeed skips a step with such a one
by itself. The numbers are DeepSpeed's own: fp64 norms of the tensors, summed in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Numbers whose fp64 copies are made at once for a norm: 32 MiB.
_PIECE = 2**22


def install(optimizer: Any, *, stage: int) -> None:
    """Let a ZeRO optimizer of DeepSpeed's take its norms so; not with offloaded states.

    Stages 1 and 2 look for infinities in every tensor, which this saves too; stage 3 looks at one
    flat tensor.
    """
    offloaded = optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload
    if offloaded or not getattr(optimizer, "compute_grad_norm", True):
        return
    group, total_in = optimizer.dp_process_group, torch.float64 if stage == 3 else torch.float32

    def norm(gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
        assert norm_type == 2, "only the L2 norm is taken"
        real = [g.detach() for g in gradients if not getattr(g, "_zero_padding", False)]
        return _total(real[: len(params)], group=group, dtype=total_in)

    optimizer.get_grad_norm_direct = norm
    if stage != 3:
        optimizer.has_overflow = lambda partition_gradients=True: False


def of_partitions(partitions: Sequence[Tensor], *, device: torch.device) -> float:
    """The L2 norm of all numbers of all ranks' partitions. All ranks must call it."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for partition in partitions:
        # In pieces: the fp64 copy of a whole partition may not fit beside the training.
        for piece in partition.detach().split(_PIECE):
            total += piece.double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())


def _total(gradients: list[Tensor], *, group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    """The norm of all ranks' gradients, () in `dtype`; -1 if it is not finite, as DeepSpeed has it.

    A norm of finite gradients is finite: their squares are summed in fp64.
    """
    norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float64))
    total = norms.pow(2.0).sum().to(dtype)
    dist.all_reduce(total, group=group)
    total = total.pow(0.5)
    return total.where(total.isfinite(), -1.0)
