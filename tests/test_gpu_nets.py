"""Networks and their parts on a CUDA device: `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch

from tests.support import golden
from trainer.adm import keyed
from trainer.adm.blocks import attend
from trainer.adm.config import Conditioning, Kernels, UNetConfig
from trainer.adm.norm import GroupNorm, use_kernels
from trainer.adm.unet import UNet
from trainer.engine import compute

pytestmark = pytest.mark.gpu

NET = UNetConfig(
    image_size=32, channels=64, channel_mult=(1, 2), blocks=1, attention=(16,), head_channels=32,
    num_classes=10,
)  # fmt: skip


def drawn(config: UNetConfig) -> UNet:
    """A net whose weights are random; those that start at zero would hide the rest."""
    torch.manual_seed(0)
    net = UNet(config)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def test_draws_have_the_same_bits_as_on_the_cpu() -> None:
    numbers = torch.arange(5) + 10**9
    for stream in (keyed.NOISE, keyed.SAMPLE_STEP + 7):
        here = keyed.normal(numbers, seed=3, stream=stream, shape=(3, 8, 8))
        there = keyed.normal(numbers.cuda(), seed=3, stream=stream, shape=(3, 8, 8))
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_net_says_the_same_in_every_precision(dtype: torch.dtype, kernels: Kernels) -> None:
    net = drawn(NET)
    x, t, y = golden.wave("x", (2, 3, 32, 32), 1.0), torch.tensor([7, 803]), torch.tensor([1, 8])
    compute.use_tf32(False)
    with torch.no_grad():
        expected = net(x, t, y)
        use_kernels(net, kernels)
        found = net.to("cuda", dtype)(x.cuda(), t.cuda(), y.cuda()).cpu()
    # On a CPU the three are off by 2e-6, 2e-2 and 3e-3.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    golden.assert_close(found, expected, tolerance=tolerance)


@pytest.mark.parametrize(("conditioning", "kernels"), [("add", "plain"), ("adagn", "fused")])
def test_a_compiled_net_has_the_gradients_of_an_uncompiled_one(
    conditioning: Conditioning, kernels: Kernels
) -> None:
    net = drawn(replace(NET, conditioning=conditioning)).cuda()
    compute.use_tf32(False)
    x, t, y = torch.randn(8, 3, 32, 32), torch.arange(8) * 100, torch.arange(8)
    found = []
    kinds: tuple[Kernels, ...] = ("plain", kernels)
    for compiles, kind in enumerate(kinds):
        use_kernels(net, kind)
        if compiles:
            compute.compile_forward(net, say=lambda _: None)
        net(x.cuda(), t.cuda(), y.cuda()).square().mean().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
        net.zero_grad()
    assert len(found[0]) == len(list(net.parameters()))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm() + 1e-6


@pytest.mark.parametrize("length", [64, 65, 256, 1024])
def test_attention_has_finite_gradients_where_all_products_are_far_below_zero(length: int) -> None:
    torch.manual_seed(0)
    qkv = 0.1 * torch.randn(2, length, 3, 4, 64, device="cuda", dtype=torch.half)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 8.0, -120.0
    qkv = qkv.flatten(2).requires_grad_()
    attend(qkv, heads=4, order="new").square().sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "size"), [(192, 32), (1152, 8)])
def test_the_fused_norm_is_no_worse_than_the_plain_one(channels: int, size: int) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(channels)
    x = torch.randn(3, channels, size, size).to(memory_format=torch.channels_last) + 2
    others = [torch.randn(shape) for shape in ((3, 2 * channels), *[(channels,)] * 3)]
    rounded = [value.half() for value in (x, *others)]
    found = []
    ways: list[tuple[Kernels, torch.dtype]] = [
        ("plain", torch.float64), ("plain", torch.half), ("fused", torch.half)
    ]  # fmt: skip
    for kernels, dtype in ways:
        use_kernels(norm, kernels)
        inputs = [v.to("cuda", dtype).requires_grad_() for v in rounded]
        x, film, shift, weight, bias = inputs
        parameters, given = {"weight": weight, "bias": bias}, {"silu": True, "shift": shift}
        out = torch.func.functional_call(norm, parameters, (x, film), given)
        found.append([out, *torch.autograd.grad(out.double().square().sum() / size, inputs)])
    for exact, plain, fused in zip(*found, strict=True):
        errors = [float((v.double() - exact).norm() / exact.norm()) for v in (plain, fused)]
        assert errors[1] < 1.5 * errors[0] + 1e-4, errors
