"""Batches: loaded images as tensors, moved to the device."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.workers import Filled


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: images uint8 (B, 3, H, W), labels int64 (B,), image indices int64 (B,).

    In memory the images are as decoded, channels last, until `to_device` makes them contiguous.
    `bad` of the images were damaged and are replaced by others.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: int = 0


def batch_of(filled: Filled, *, pin: bool) -> Batch:
    """Make a batch of loaded images; `pin` copies it to page-locked memory."""
    return Batch(
        images=_tensor(filled.images, pin).permute(0, 3, 1, 2),
        labels=_tensor(filled.labels, pin),
        indices=_tensor(np.array(filled.request.indices, dtype=np.int64), pin),
        bad=len(filled.bad),
    )


def to_device(batches: Iterator[Batch], *, device: torch.device) -> Iterator[Batch]:
    """Move batches to the device and make them contiguous; copies to a GPU overlap its computing.

    Shapes and dtypes stay those of `Batch`. For a GPU, the batches should be pinned. A batch is
    taken from `batches` only when it is asked for.
    """
    side = _copying(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(side):
            tensors = [
                tensor.to(device, non_blocking=True).contiguous()
                for tensor in (batch.images, batch.labels, batch.indices)
            ]
        if side:
            compute = torch.cuda.current_stream(device)
            compute.wait_stream(side)
            for tensor in tensors:
                tensor.record_stream(compute)
        yield Batch(images=tensors[0], labels=tensors[1], indices=tensors[2], bad=batch.bad)


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream for copies: one, since the allocator keeps separate memory for each."""
    return torch.cuda.Stream(device)


def _tensor(array: np.ndarray, pin: bool) -> Tensor:
    source = torch.from_numpy(array)
    if not pin:
        return source
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    # numpy copies in this thread; torch would start threads that occupy the workers' cores.
    np.copyto(copy.numpy(), array)
    return copy
