"""What DeepSpeed does for every parameter in every micro-batch, done once or not at all.

At the paper's batch on many GPUs a micro-batch has few images, and the host limits: it calls a
hook for each of hundreds of parameters. Losses and weights stay the same bits.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def install(optimizer: Any, *, stage: int) -> None:
    """Install them in a ZeRO optimizer of DeepSpeed's."""
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
        whole = not optimizer.reduce_scatter
        aside = optimizer.overlap_comm and whole and torch.cuda.is_available()
        Buckets(optimizer, aside=aside).install()
        if aside:
            _reduce_aside(optimizer)


def _reduce_aside(optimizer: Any) -> None:
    """Reduce full buckets on a stream of their own, beside the rest of the backward pass.

    DeepSpeed, which has two buffers for all buckets, lets the backward pass wait for a bucket when
    the next is full, and the host for the device when the pass has ended. A compiled pass fills
    many buckets at once: here each has a buffer, and the device alone waits, when it has ended.
    """
    side, finish = optimizer.reduction_stream, optimizer.independent_gradient_partition_epilogue

    def average(flat: Tensor, comm_dtype: torch.dtype) -> None:
        stream = side if optimizer.overlap_comm else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            reduced = optimizer.gradient_reduction_w_predivide(flat, comm_dtype)
            # Where gradients are added up in fp32; else it does nothing.
            optimizer._add_full_reduction_to_compact_grad_partition(reduced, comm_dtype)

    def end() -> None:
        torch.cuda.current_stream().wait_stream(side)
        optimizer.overlap_comm = False  # nothing is left beside which to reduce the last bucket
        finish()
        optimizer.overlap_comm = True

    optimizer.average_tensor, optimizer.independent_gradient_partition_epilogue = average, end


class Buckets:
    """Gradients are copied into a bucket when it is full, instead of one after the other.

    Buckets that are reduced `aside` have a buffer each.
    """

    def __init__(self, optimizer: Any, *, aside: bool) -> None:
        self._optimizer, self._aside, self._most = optimizer, aside, optimizer.reduce_bucket_size
        self._reduce = optimizer.reduce_ipg_grads
        self._add = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def install(self) -> None:
        """Take the place of the optimizer's own buckets."""
        self._optimizer.reduce_independent_p_g_buckets_and_remove_grads = self._keep
        self._optimizer.reduce_ipg_grads = self._fill_and_reduce

    def _keep(self, param: Any, group: int) -> None:
        """Take up the gradient of a parameter."""
        optimizer, size = self._optimizer, param.numel()
        dtype = optimizer.get_param_comm_dtype(param)
        bucket = optimizer.ipg_buckets[dtype]
        if bucket.elements and bucket.elements + size > self._most:
            self._empty(bucket, dtype)
        if size > self._most:
            self._keep_large(bucket, param, group)
            return
        if param.is_cuda:
            bucket.copy_streams.add(torch.cuda.current_stream())
        bucket.elements += size
        bucket.grads.append(optimizer.get_gradient_for_reduction(param))
        bucket.params.append((group, param.param_idx_in_group, optimizer.get_param_id(param)))

    def _keep_large(self, bucket: Any, param: Any, group: int) -> None:
        """Let a gradient that fits in no bucket be reduced where it is."""
        index = bucket.index
        self._add(param, group)
        bucket.index = index  # which `_add` has changed
        if self._aside and param.is_cuda:
            gradient = self._optimizer.get_gradient_for_reduction(param)
            gradient.record_stream(self._optimizer.reduction_stream)

    def _empty(self, bucket: Any, dtype: torch.dtype) -> None:
        """Reduce a bucket, and go on in a buffer from which nothing is being reduced."""
        in_buffer = bucket.elements <= self._most
        self._fill_and_reduce(dtype)
        if in_buffer and self._aside:
            bucket.index += 1
            if bucket.index == len(bucket.buffer):
                bucket.buffer.append(torch.empty_like(bucket.buffer[0]))
        elif in_buffer and self._optimizer.overlap_comm:
            bucket.index = 1 - bucket.index

    def _fill_and_reduce(self, comm_dtype: torch.dtype | None = None) -> None:
        for dtype, bucket in self._optimizer.ipg_buckets.items():
            if comm_dtype in (None, dtype) and 0 < bucket.elements <= self._most:
                _fill(bucket, unflatten=self._optimizer.unflatten)
        self._reduce(comm_dtype=comm_dtype)


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
