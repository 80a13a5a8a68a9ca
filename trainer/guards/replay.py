"""The replay of a rank's micro-batches: the same images, timesteps, noise and dropout once more.

All of these are functions of (seed, image index, rank), so any rank can compute what any other did.
A replay leaves neither gradients nor anything else behind; it is known by its fingerprint.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.stream import Batch
from trainer.adm.objective import Objective
from trainer.engine.partition import checksum

# What replays may differ in where sums have no fixed order: a share of a gradient's norm.
_BOUNDS = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
# Gradients of less than this share of the whole gradient are compared as if they were of this size.
_SMALL = 1e-2
_SIGNS = 4096


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a rank found: losses by image, and gradients by parameter, in the network's order."""

    losses: tuple[float, ...]
    #: The bits of the losses, and sums of the bits of each gradient.
    loss_bits: tuple[int, ...]
    bits: tuple[int, ...]
    #: The norm of each gradient, and its product with a vector of random signs.
    norms: tuple[float, ...]
    products: tuple[float, ...]
    #: The norm of the whole gradient of each micro-batch.
    micro_norms: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Of the whole gradient, all micro-batches in turn: the mean one has no larger norm."""
        return math.fsum(self.micro_norms) / max(1, len(self.micro_norms))

    def has_losses(self, losses: Tensor, *, bound: float) -> bool:
        """Whether the losses are these, (images,) fp32 on the host; as `is_same`."""
        if self.loss_bits == tuple(losses.view(torch.int32).tolist()):
            return True
        return bool(bound) and _are_close(self.losses, losses.tolist(), bound=bound)

    def is_same(self, other: "Replay", *, bound: float) -> bool:
        """Whether both are one computation: bit for bit, or where `bound` is not 0 within it."""
        if self.loss_bits == other.loss_bits and self.bits == other.bits:
            return True
        if not bound:
            return False
        least = _SMALL * math.sqrt(math.fsum(norm**2 for norm in self.norms))
        sizes = [max(norm, least) for norm in self.norms]
        pairs = (self.norms, other.norms), (self.products, other.products)
        return _are_close(self.losses, other.losses, bound=bound) and all(
            _is_close(a, b, size=size, bound=bound)
            for mine, theirs in pairs
            for a, b, size in zip(mine, theirs, sizes, strict=True)
        )


def _are_close(ours: Sequence[float], theirs: Sequence[float], *, bound: float) -> bool:
    """Whether losses of the same images agree, within a share of each or of their mean."""
    sizes = [abs(loss) for loss in ours if math.isfinite(loss)]
    mean = math.fsum(sizes) / max(len(sizes), 1)
    return all(
        _is_close(a, b, size=max(abs(a), mean), bound=bound)
        for a, b in zip(ours, theirs, strict=True)
    )


def _is_close(a: float, b: float, *, size: float, bound: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b) <= bound * size
    return math.isfinite(a) == math.isfinite(b)


def dropout_seed(seed: int, images_seen: int, rank: int) -> int:
    """Dropout is keyed by (seed, clock, rank): exact on resume, not across numbers of ranks."""
    key = np.random.SeedSequence([seed, images_seen, rank])
    return int(key.generate_state(1, np.uint64)[0]) >> 1


def bound_on(device: torch.device, dtype: torch.dtype) -> float:
    """What two replays may differ in: nothing in fp32 on a CPU.

    In 16 bits a CPU's kernels, too, depend on where tensors are in memory.
    """
    return 0.0 if (device.type, dtype) == ("cpu", torch.float32) else _BOUNDS[dtype]


def replay(
    net: nn.Module, objective: Objective, batches: Iterable[Batch], *, loss_scale: float
) -> Replay:
    """Compute the losses and gradients of micro-batches, which are on the device of `net`.

    The caller has set torch's seed. Each gradient is taken in and dropped as soon as it is there,
    so that a replay takes no more memory than a micro-batch.
    """
    net.train()
    parameters = list(net.parameters())
    device = parameters[0].device
    bits = torch.zeros(len(parameters), dtype=torch.int64, device=device)
    each: list[Tensor] = []  # of every micro-batch: squared norms and products by parameter
    signs = _signs(device)

    def take(number: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        bits[number] += checksum(gradient)
        exact = gradient.flatten().double()
        each[-1][0, number] = exact.square().sum()
        padded = torch.nn.functional.pad(exact, (0, -len(exact) % _SIGNS))
        each[-1][1, number] = (padded.view(-1, _SIGNS) @ signs).sum()
        parameter.grad = None

    for number, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda p, n=number: take(n, p))
    losses = []
    for batch in batches:
        terms = objective(net, batch.images, batch.labels, batch.indices)
        each.append(torch.zeros(2, len(parameters), dtype=torch.float64, device=device))
        (terms["loss"].mean() * loss_scale).backward()
        losses.append(terms["loss"].detach().float())
    flat = torch.cat(losses)
    table = torch.stack(each) / torch.tensor([[loss_scale**2], [loss_scale]]).to(each[0])
    return Replay(
        losses=tuple(flat.tolist()),
        loss_bits=tuple(flat.view(torch.int32).tolist()),
        bits=tuple(bits.tolist()),
        norms=tuple(table[:, 0].sum(0).sqrt().tolist()),
        products=tuple(table[:, 1].sum(0).tolist()),
        micro_norms=tuple(table[:, 0].sum(1).sqrt().tolist()),
    )


def _signs(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_SIGNS,), generator=generator)
    return (2.0 * signs - 1.0).double().to(device)
