"""The fused norm with Triton's interpreter, against double precision: `python -m` this, JSON out.

A process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import json
import os
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn

from tests.support import golden
from trainer.adm import fused
from trainer.adm.config import GROUPS, UNetConfig
from trainer.adm.norm import GroupNorm, use_kernels
from trainer.adm.unet import UNet

# Batch, channels, height, dtype, conditioned, activated, mean of the values.
CASES = (
    (2, 192, 8, "float32", False, True, 50.0),
    (1, 960, 4, "float32", True, True, 3.0),
    (2, 256, 12, "float16", True, True, 2.0),
    (1, 384, 8, "bfloat16", False, True, 1.0),
    (2, 64, 5, "float32", False, False, 0.0),
    (2, 64, 20, "float16", True, True, 1.0),
    (1, 1536, 4, "float16", True, True, 0.0),
    (1, 64, 1, "float32", True, True, 0.0),
    (1, 32, 70, "float32", True, True, 1000.0),
    (2, 96, 9, "float64", True, True, 5.0),
)
NET = UNetConfig(
    image_size=4, channels=32, channel_mult=(1, 2), blocks=1, attention=(), head_channels=32,
    num_classes=4, qkv="new",
)  # fmt: skip


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted."""
    off = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return off.item()


def gradients(
    norm: GroupNorm, x: Tensor, given: dict[str, Tensor], dy: Tensor, *, silu: bool
) -> dict:
    """The output and every gradient; film and shift may be given."""
    leaves = {name: value.clone().requires_grad_() for name, value in {"x": x, **given}.items()}
    y = norm(leaves["x"], leaves.get("film"), silu=silu, shift=leaves.get("shift"))
    inputs = {**leaves, **dict(norm.named_parameters())}
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def case(
    batch: int, channels: int, size: int, dtype: str, given: bool, silu: bool, mean: float
) -> dict:
    """Errors of the fused and of the plain norm."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    norm = GroupNorm(channels)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias, 0, 0.3)
    norm.to(kind)
    x = (2 * torch.randn(batch, channels, size, size) + mean).to(kind, memory_format=fused.LAYOUT)
    film, shift = 0.3 * torch.randn(batch, 2 * channels), torch.randn(channels)
    also = {"film": film.to(kind), "shift": shift.to(kind)} if given else {}
    if channels == GROUPS:  # a group of one channel takes no notice of it
        also.pop("shift", None)
    dy = torch.randn_like(x)
    results = {}
    for kernels in ("fused", "plain"):
        use_kernels(norm, kernels)
        results[kernels] = gradients(norm, x, also, dy, silu=silu)
    assert results["fused"]["y"].is_contiguous(memory_format=fused.LAYOUT)
    exact = {name: value.double() for name, value in also.items()}
    wanted = gradients(norm.double(), x.double(), exact, dy.double(), silu=silu)
    errors = {k: {n: distance(v[n], wanted[n]) for n in wanted} for k, v in results.items()}
    return {"case": [batch, channels, size, dtype, given, silu, mean], **errors}


def answer(forward: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The output of a module and the gradients of its parameters."""
    module.zero_grad()
    out = forward(*inputs)
    out.square().mean().backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return [out.detach().clone(), torch.cat(gradients).clone()]


def nets() -> dict[str, list[float]]:
    """In double precision: a net fused against plain, and its first block in a compiled graph."""
    net = UNet(NET).double()
    golden.set_formula_weights(net)
    block: Any = net.input_blocks[1]
    inputs = {
        "net": (golden.wave("x", (1, 3, 4, 4), 1.0), torch.tensor([900]), torch.tensor([2])),
        "block": (
            golden.wave("h", (1, 32, 4, 4), 1.0).double(),
            net.embed(torch.tensor([7])).detach(),
        ),
    }
    plain = {
        "net": answer(net, net, *inputs["net"]),
        "block": answer(block, block, *inputs["block"]),
    }
    use_kernels(net, "fused")
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = {
        "net": answer(net, net, *inputs["net"]),
        "block": answer(compiled, block, *inputs["block"]),
    }
    return {
        k: [distance(*pair) for pair in zip(v, plain[k], strict=True)] for k, v in found.items()
    }


def check_operation() -> dict[str, str]:
    """What PyTorch's own check of a custom operation says."""
    x = torch.randn(2, 64, 4, 4).to(memory_format=fused.LAYOUT).requires_grad_()
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))
    film = torch.randn(2, 128, requires_grad=True)
    shift = torch.randn(64, requires_grad=True)
    inputs = (x, weight, bias, film, shift, 32, 1e-5, True)
    return dict(torch.library.opcheck(fused.norm, inputs, raise_exception=False))


def main() -> None:
    """Print all results."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"cases": [case(*each) for each in CASES], "nets": nets()}
    found["check"] = {name: str(said) for name, said in check_operation().items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
