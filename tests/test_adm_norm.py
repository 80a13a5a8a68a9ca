"""GroupNorm and the layout of maps: the same numbers whichever way they lie in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import golden
from tests.test_adm_unet import small_classifier, small_inputs, small_unet
from trainer.adm.norm import GroupNorm

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def answer(net: Any) -> list[Tensor]:
    """Output and gradient in double precision."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in small_inputs(net).items()}
    net.double().zero_grad()
    out = net(**inputs)
    (out * golden.wave("dy", tuple(out.shape), 1.0)).sum().backward()
    return [out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])]


@pytest.mark.parametrize(
    "net",
    [
        small_unet(qkv="new"),
        small_unet(conditioning="add", resample="conv"),
        small_unet(conditioning="concat", small_size=8),
        small_unet(attention=(16, 8), local_attention=(16,), local_window=4),
        small_classifier(),
        small_classifier(pool="spatial_v2"),
    ],
)
def test_a_net_computes_the_same_in_both_layouts(net: Any) -> None:
    results = []
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5, generator=generator)
    for net.layout in LAYOUTS:
        results.append(answer(net))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-13 * wanted.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
def test_a_norm_is_exact_far_from_zero(layout: torch.memory_format, given: bool) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(64)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 64, 48, 48) + 1000).contiguous(memory_format=layout)
    film = torch.randn(2, 128) if given else None
    found = norm(x, film, silu=True)
    wanted = norm.double()(x.double(), None if film is None else film.double(), silu=True)
    assert found.is_contiguous(memory_format=layout)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_activations_are_channels_last_and_weights_are_not() -> None:
    net: Any = small_unet()
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda _, __, out: seen.append(out))
    net(**small_inputs(net))
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)
    assert all(p.is_contiguous() for p in net.parameters())


def test_attention_over_a_whole_map_copies_nothing() -> None:
    net: Any = small_unet(head_channels=16, heads=None)
    block = net.middle_block[1]
    x = golden.wave("map", (2, 64, 8, 8), 1.0).contiguous(memory_format=torch.channels_last)
    names = set()

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    block.norm = nn.Identity()
    with torch.no_grad(), Named():
        out = block(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not names & {"clone", "copy_", "_to_copy", "cat"}, names
