"""Which part of each parameter's fp32 state a rank holds, and whole states made from all parts.

DeepSpeed-ZeRO deals the state to the ranks, in stages 1 and 2 as one flat tensor that is cut where
it happens to be, in stage 3 parameter by parameter. A whole state is gathered in few large pieces
on its way to the host: one collective for each parameter would cost thousands in every checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.ranks.group import gather

# Numbers that all ranks together send in one collective: 256 MiB of fp32.
_PIECE = 2**26


class Partition:
    """A network's parameters as DeepSpeed has dealt their fp32 state to the ranks.

    `key` names a state of the optimizer, or None the fp32 weights. All ranks must make it, and call
    its methods, together.
    """

    def __init__(self, parameters: Mapping[str, Any], *, shapes: Mapping[str, torch.Size]) -> None:
        self._parameters = dict(parameters)
        self._shapes = dict(shapes)
        self._device: torch.device = next(iter(self._parameters.values())).device
        self._parts = gather([_held(parameter) for parameter in self._parameters.values()])
        self._longest = max(sum(map(len, parts)) for parts in self._parts)

    def set(self, name: str, key: str | None, value: Tensor) -> None:
        """Set this rank's part of a parameter's state from the whole `value`, of any shape."""
        parameter, part = self._parameters[name], _held(self._parameters[name])
        own = value.flatten()[part.start : part.stop].to(self._device, torch.float32)
        if hasattr(parameter, "ds_id"):
            # All parts are equally long, and DeepSpeed leaves the end of the last uninitialized,
            # which would count in norms. Its setter of whole tensors needs sizes that divide.
            own = F.pad(own, (0, parameter.ds_tensor.numel() - len(part)))
            parameter._z3_optimizer.set_local_hp_param(own, parameter, key)
        elif parameter._hp_mapping is not None:
            parameter._hp_mapping.get_hp_fragment(key).data.copy_(own)

    def spread(self, start: Mapping[str, Tensor] | None, *, keys: Sequence[str | None]) -> None:
        """Set this rank's parts of the states `keys` from whole values that the main rank has.

        On the other ranks `start` is None.
        """
        for name, shape in self._shapes.items():
            if start is None:
                value = torch.empty(shape, device=self._device)
            else:
                value = start[name].detach().to(self._device, torch.float32).contiguous()
            dist.broadcast(value, 0)
            for key in keys:
                self.set(name, key, value)

    def gather(self, key: str | None, *, to: int | None) -> dict[str, Tensor]:
        """Whole fp32 tensors on the host by parameter name.

        They go to rank `to` alone, and the other ranks get nothing; None means to every rank.
        """
        held = [_own(p, key) for p in self._parameters.values() if _held(p)]
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

    def differing(self, copies: Mapping[str, Tensor]) -> dict[int, str]:
        """Where this rank's copies of the weights, whole by name, are not their owners' masters.

        Owners by rank, each with the first parameter in which its part differs. The copies of
        stage 3 were gathered from the owners, so each rank compares its own part alone.
        """
        me, names = dist.get_rank(), list(self._parameters)
        pairs = zip(self._parameters.values(), copies.values(), strict=True)
        masters = [_own(p, None).to(copy.device, copy.dtype) for p, copy in pairs]
        owners = gather(_checksums(masters))
        whole = not any(hasattr(p, "ds_id") for p in self._parameters.values())
        found = {}
        for rank in range(len(owners)) if whole else [me]:
            parts = zip(copies.values(), self._parts[rank], strict=True)
            mine = _checksums([c.flatten()[p.start : p.stop] for c, p in parts])
            wrong = [n for n, a, b in zip(names, mine, owners[rank], strict=True) if a != b]
            if wrong:
                found[rank] = wrong[0]
        return found

    def _assemble(self, flats: Tensor) -> dict[str, Tensor]:
        values = [torch.empty(shape.numel()) for shape in self._shapes.values()]
        for flat, parts in zip(flats, self._parts, strict=True):
            first = 0
            for value, part in zip(values, parts, strict=True):
                value[part.start : part.stop].copy_(flat[first : first + len(part)])
                first += len(part)
        named = zip(self._shapes.items(), values, strict=True)
        return {name: value.view(shape) for (name, shape), value in named}


def _held(parameter: Any) -> range:
    """Which numbers of a parameter this rank holds; all parts of ZeRO-3 but the last are full."""
    if hasattr(parameter, "ds_id"):
        size, end = parameter.ds_tensor.numel(), parameter.ds_numel
        start = min(dist.get_rank() * size, end)
        return range(start, min(start + size, end))
    if parameter._hp_mapping is None:
        return range(0)
    address = parameter._hp_mapping.lp_fragment_address
    return range(address.start, address.start + address.numel)


def _own(parameter: Any, key: str | None) -> Tensor:
    """The numbers that this rank holds of a parameter's state, flat, if any."""
    if not _held(parameter):
        return torch.empty(0)
    if hasattr(parameter, "ds_id"):
        part: Tensor = parameter._z3_optimizer.get_local_fp32_param(parameter, key)
        return part[: len(_held(parameter))]
    fragment: Tensor = parameter._hp_mapping.get_hp_fragment(key)
    return fragment.detach().flatten()


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


def checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits of all numbers, int64: one flipped bit changes it."""
    whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().flatten().view(whole).sum(dtype=torch.int64)


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    sums: list[int] = torch.stack([checksum(tensor) for tensor in tensors]).tolist()
    return sums
