"""What a step costs, counted before it runs: operations, memory of a rank, bytes between ranks.

Pure functions of the preset, ds_config.json and the number of ranks. Nothing is allocated: the net
is built on torch's meta device. `zero` is the section zero_optimization of ds_config.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.adm.config import GROUPS, NetworkConfig
from trainer.adm.encoder import Network
from trainer.adm.norm import GroupNorm
from trainer.adm.unet import build, example_inputs
from trainer.config.experiment import Config
from trainer.engine.compute import DTYPES

# Bytes of an fp32 number.
_FULL = 4
# What a step needs beside the saved activations, as a share of them: mostly the maps of a block.
_WORKSPACE = 0.05
# DeepSpeed's defaults, as counts of numbers: the largest parameter that ZeRO-3 keeps whole on every
# rank, and how many it may have gathered at once.
_PERSISTENT, _LIVE = 100_000, 1_000_000_000
# Likewise, the size of a bucket of gradients.
_BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class NetCosts:
    """What one image costs in a network, and the sizes of the network's parameters."""

    #: How many numbers each parameter has.
    sizes: tuple[int, ...]
    #: Operations of one image's forward pass, two per multiply-add, in convolutions, linear layers
    #: and attention products; a step takes three times that.
    forward_flops: int
    #: For each part that is compiled by itself, first to last, its share of the operations and of
    #: the parameters.
    parts: tuple[tuple[float, float], ...]
    #: Bytes that the forward pass of one image keeps for the backward pass.
    saved_bytes: int
    #: Bytes of a number in the training precision.
    element: int

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(self.sizes)


def count(config: Config) -> NetCosts:
    """The costs of a preset's network."""
    training = config.training
    dtype, is_fused = DTYPES[training.precision], training.kernels == "fused"
    return of_network(config.model, dtype=dtype, is_fused=is_fused)


@cache
def of_network(
    model: NetworkConfig,
    *,
    dtype: torch.dtype = torch.float32,
    is_fused: bool = False,
) -> NetCosts:
    """The costs of a network that computes in `dtype`, counted once, from shapes alone."""
    with torch.device("meta"):
        net = build(model).to(dtype)
        for norm in net.modules():
            if is_fused and isinstance(norm, GroupNorm):
                norm.forward = partial(_fused, norm)  # type: ignore[method-assign]
        sizes = tuple(p.numel() for p in net.parameters())
        kept = [_saved_bytes(net, example_inputs(model, images=n)) for n in (1, 2)]
        parts = _parts(net, example_inputs(model, images=1))
    operations = sum(done for done, _ in parts)
    return NetCosts(
        sizes=sizes,
        forward_flops=operations,
        parts=tuple((done / operations, held / sum(sizes)) for done, held in parts),
        saved_bytes=kept[1] - kept[0],
        element=dtype.itemsize,
    )


class _AsOnDevices(TorchFunctionMode):
    """Lets the meta device keep for the backward pass what real devices do: of attention no matrix
    of weights, of dropout one byte for each number.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float, training: bool, **_: Any) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if p and training else x


class _FusedNorm(torch.autograd.Function):
    """Keeps for the backward pass what the fused norm does: the map, its conditioning, and two
    numbers per group.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, film: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, film, x.new_empty((len(x), 2, GROUPS), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError("costs are of the forward pass")


def _fused(norm: GroupNorm, x: Tensor, film: Tensor | None = None, **given: Any) -> Tensor:
    if x.dim() != 4:
        return GroupNorm.forward(norm, x, film, **given)
    out: Tensor = _FusedNorm.apply(x, film, norm.weight)
    return out


def _saved_bytes(net: torch.nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors that a forward pass keeps, each storage once and no parameter."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage()._cdata] = value
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with _AsOnDevices(), hooks:
        net(**inputs)
    return sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in own)


def _parts(net: Network, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """The operations, and the number of parameters, of each part of a network's forward pass.

    The network's methods are replaced to count them, so that it is of no use afterwards.
    """
    found, used = [], dict[Tensor, None]()

    def use(module: torch.nn.Module, _: object) -> None:
        used.update(dict.fromkeys(module.parameters(recurse=False)))

    def counted(part: Callable[..., Any], *args: Any) -> Any:
        used.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = part(*args)
        found.append((int(counter.get_total_flops()), sum(p.numel() for p in used)))
        return out

    for module in net.modules():
        module.register_forward_pre_hook(use)
    for name in net.parts:
        setattr(net, name, partial(counted, getattr(net, name)))
    net(**inputs)
    return found


def memory(
    net: NetCosts,
    *,
    averages: int,
    zero: Mapping[str, Any],
    ranks: int,
    micro_batch: int,
    accumulation: int,
) -> dict[str, int]:
    """Bytes of a rank by part, at the fullest moment of a step.

    `averages` is the number of averages (EMA). Besides the state, which is always there, a rank
    holds what the backward pass needs, or later what the optimizer's step needs: the larger counts.
    """
    stage, element = zero["stage"], net.element
    whole, share = net.parameters, net.parameters / ranks
    offloaded = "cpu" in str(zero.get("offload_optimizer", {}))
    bucket = min(zero.get("reduce_bucket_size", _BUCKET), whole) * element
    small = sum(size for size in net.sizes if size <= _threshold(zero))
    state = {
        "weights": element * (whole if stage < 3 else share + small),
        "masters, moments, averages": 0 if offloaded else _FULL * (3 + averages) * share,
    }
    activations = {
        "activations": micro_batch * net.saved_bytes,
        "workspace": micro_batch * net.saved_bytes * _WORKSPACE,
    }
    if stage == 3:
        live = min(whole - small, zero.get("stage3_max_live_parameters", _LIVE))
        state |= {"gradients": element * share, "buckets": bucket}
        backward = {**activations, "gathered weights": element * live, "reduction": bucket}
    else:
        # Stage 1 keeps whole gradients until the last micro-batch; stage 2 adds shares of two.
        copies = 1 if accumulation == 1 else 2
        keeps_all = stage == 1 and accumulation > 1
        gradients = whole if keeps_all else copies * share
        many = not (keeps_all or offloaded)  # else buckets take the place of what they hold
        buffers = bucket * _buffers(net, zero=zero, many=many)
        backward = {**activations, "gradients": element * gradients, "buckets": buffers}
    step = {"optimizer's step": (_FULL + element) * share}
    if offloaded:
        step = {"optimizer's step": element * share}
    fullest = max(backward, step, key=lambda parts: sum(parts.values()))
    return {name: int(size) for name, size in {**state, **fullest}.items()}


def _buffers(net: NetCosts, *, zero: Mapping[str, Any], many: bool) -> int:
    """How many buckets of gradients a GPU holds at once; see `trainer.engine.shortcuts`."""
    if not zero.get("overlap_comm"):
        return 1
    if not many or not zero.get("use_multi_rank_bucket_allreduce", True):
        return 2
    return max(len(buckets(net, zero=zero)), 2)


class Moved(NamedTuple):
    """What the collectives of one kind move in a step."""

    #: Bytes: of the result of an all-gather, of the input of the others.
    size: int
    #: How many collectives there are.
    calls: int


def collectives(
    net: NetCosts, *, zero: Mapping[str, Any], ranks: int, accumulation: int
) -> dict[str, Moved]:
    """What a step reduces and gathers, by collective; those of single numbers are left out.

    In stage 3 it is assumed that each large parameter is gathered by one call; DeepSpeed joins
    some of them, and repeats others.
    """
    if ranks == 1:
        return {}
    whole = net.element * net.parameters
    # Stage 1 reduces once, the others in every micro-batch.
    passes = 1 if zero["stage"] == 1 else accumulation
    reductions = passes * len(buckets(net, zero=zero))
    if zero["stage"] == 3:
        large = [size for size in net.sizes if size > _threshold(zero)]
        gathered = net.element * sum(large)
        small = whole - gathered
        # The weights gathered for the forward pass serve the backward pass where all may stay.
        stays = sum(large) <= zero.get("stage3_max_live_parameters", _LIVE)
        turns = accumulation * (1 if stays else 2)
        return {
            "reduce_scatter": Moved(passes * whole, reductions),
            "all_gather": Moved(turns * gathered + small, accumulation * len(large) + 1),
        }
    gathered_once = {"all_gather": Moved(whole, 1)}
    if zero.get("use_multi_rank_bucket_allreduce", True):
        return {"all_reduce": Moved(passes * whole, reductions), **gathered_once}
    # Each rank's part of the gradients goes to it alone, in two where it crosses buckets.
    parts = passes * (ranks - 1)
    return {"reduce": Moved(passes * whole, reductions + parts), **gathered_once}


def buckets(net: NetCosts, *, zero: Mapping[str, Any]) -> list[int]:
    """The sizes, in numbers, of the buckets in which gradients are reduced, first to last."""
    most = zero.get("reduce_bucket_size", _BUCKET)
    filled = [0]
    for size in reversed(net.sizes):
        if filled[-1] and filled[-1] + size > most:
            filled.append(0)
        filled[-1] += size
    return filled


def _threshold(zero: Mapping[str, Any]) -> int:
    """The largest parameter, in numbers, that ZeRO-3 keeps whole on every rank."""
    size: int = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    return size
