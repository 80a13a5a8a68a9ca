"""Which part of each parameter's fp32 state a rank holds, and whole states made from all parts.

DeepSpeed-ZeRO deals the state to the ranks, in stages 1 and 2 as one flat tensor that is cut where
it happens to be, in stage 3 parameter by parameter. A whole state is gathered in few large pieces
on its way to the host: one collective for each parameter would cost thousands in every checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

#: Numbers that all ranks together send in one collective: 256 MiB of fp32.
_PIECE = 2**26


@dataclass(frozen=True)
class Part:
    """The numbers [start, start + size) of a flattened parameter, by its place in the network."""

    parameter: int
    start: int
    size: int


class Partition:
    """The parts of all ranks. All ranks must make it, and call its methods, together."""

    def __init__(
        self, own: Sequence[Part], *, shapes: dict[str, torch.Size], device: torch.device
    ) -> None:
        self._shapes = shapes
        self._device = device
        self._parts: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(self._parts, list(own))
        self._longest = max(sum(part.size for part in parts) for parts in self._parts)

    def gather(self, own: Sequence[Tensor], *, to: int | None) -> dict[str, Tensor]:
        """Whole fp32 tensors on the host by parameter name, from each rank's flat parts `own`.

        They go to rank `to` alone, and the other ranks get nothing; None means to every rank.
        """
        held = [part for part in own if len(part)]  # the others may be on another device
        flat = torch.cat(held) if held else torch.empty(0)
        flat = F.pad(flat, (0, self._longest - len(flat)))
        ranks, receives = len(self._parts), to in (None, dist.get_rank())
        length = max(1, _PIECE // ranks)
        whole = torch.empty(ranks, self._longest if receives else 0)
        for first in range(0, self._longest, length):
            piece = flat[first : first + length].to(self._device, torch.float32)
            for rank, received in enumerate(_exchange(piece, to=to)):
                whole[rank, first : first + length] = received
        return self._assemble(whole) if receives else {}

    def _assemble(self, flats: Tensor) -> dict[str, Tensor]:
        values = [torch.empty(shape.numel()) for shape in self._shapes.values()]
        for flat, parts in zip(flats, self._parts, strict=True):
            first = 0
            for part in parts:
                into = values[part.parameter][part.start : part.start + part.size]
                into.copy_(flat[first : first + part.size])
                first += part.size
        named = zip(self._shapes.items(), values, strict=True)
        return {name: value.view(shape) for (name, shape), value in named}


def _exchange(piece: Tensor, *, to: int | None) -> list[Tensor]:
    """The pieces of all ranks, on the ranks that receive them."""
    received = []
    if to in (None, dist.get_rank()):
        received = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
    if to is None:
        dist.all_gather(received, piece)
    else:
        dist.gather(piece, received or None, dst=to)
    return received
