"""What DeepSpeed does for every parameter in every micro-batch, done once or not at all.

At the paper's batch on many GPUs a micro-batch has few images, and the host limits: it calls a
hook for each of hundreds of parameters. Losses and weights stay the same bits.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    if optimizer.contiguous_gradients and not optimizer.cpu_offload:
        _fill_buckets_at_once(optimizer)


def _fill_buckets_at_once(optimizer: Any) -> None:
    """Copy gradients into a bucket when it is full, instead of one after the other."""
    most, reduce = optimizer.reduce_bucket_size, optimizer.reduce_ipg_grads
    add = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def keep(param: Any, group: int) -> None:
        size, dtype = param.numel(), optimizer.get_param_comm_dtype(param)
        bucket = optimizer.ipg_buckets[dtype]
        if size > most:
            add(param, group)  # it is reduced where it is
            return
        if bucket.elements + size > most:
            optimizer.reduce_ipg_grads(comm_dtype=dtype)
            if optimizer.overlap_comm:
                bucket.index = 1 - bucket.index
        if param.is_cuda:
            bucket.copy_streams.add(torch.cuda.current_stream())
        bucket.elements += size
        bucket.grads.append(optimizer.get_gradient_for_reduction(param))
        bucket.params.append((group, param.param_idx_in_group, optimizer.get_param_id(param)))

    def fill_and_reduce(comm_dtype: torch.dtype | None = None) -> None:
        for dtype, bucket in optimizer.ipg_buckets.items():
            if comm_dtype in (None, dtype) and 0 < bucket.elements <= most:
                _fill(bucket, unflatten=optimizer.unflatten)
        reduce(comm_dtype=comm_dtype)

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = keep
    optimizer.reduce_ipg_grads = fill_and_reduce


def _fill(bucket: Any, *, unflatten: Callable[..., tuple[Tensor, ...]]) -> None:
    """Copy the gradients of a bucket into its buffer, where they are from now on.

    Compiled backward passes may call hooks on other streams than the current one.
    """
    own = {torch.cuda.current_stream()} if bucket.copy_streams else set()
    for stream in bucket.copy_streams - own:
        torch.cuda.current_stream().wait_stream(stream)
    flat = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
    parts = unflatten(flat, bucket.grads)
    torch._foreach_copy_(parts, bucket.grads)
    for stream in bucket.copy_streams - own:  # it frees the memory of its gradients
        stream.wait_stream(torch.cuda.current_stream())
    bucket.copy_streams |= own
    for gradient, part in zip(bucket.grads, parts, strict=True):
        gradient.data = part
