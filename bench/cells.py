"""The measurements of `bench.gpu`: each takes a description and returns figures.

On a CPU all are small: 16 pixels, fp32, and compiled networks by aot_eager.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler

from bench import nets
from bench.nets import Net
from trainer.adm.config import Kernels, UNetConfig
from trainer.adm.encoder import Network
from trainer.adm.norm import GroupNorm, use_kernels
from trainer.adm.sampler import classifier_guidance
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.engine import compute
from trainer.engine.compute import DTYPES
from trainer.planning import costs

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = UNetConfig(
    image_size=16, channels=32, channel_mult=(1, 2), blocks=1, attention=(8,), head_channels=32,
    num_classes=10, qkv="new",
)  # fmt: skip
Figures = dict[str, Any]


def seconds(work: Callable[[], object], *, least: float = 1.0, warm_up: int = 2) -> float:
    """The time of one call, the host's part in it: the mean over at least so many seconds."""
    for _ in range(warm_up):
        work()
    _wait()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < (least if GPU else 0.05) or not calls:
        work()
        calls += 1
        if calls % 4 == 0:
            _wait()
    _wait()
    return (time.perf_counter() - began) / calls


def alone(work: Callable[[], object]) -> float:
    """The time of one call by itself: calls are replayed as a CUDA graph, without the host."""
    if not GPU:
        return seconds(work)
    from triton.testing import do_bench_cudagraph  # which a CPU may lack

    milliseconds: Any = do_bench_cudagraph(work, rep=50)
    return float(milliseconds) / 1e3


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def ceilings(cell: Figures) -> Figures:
    """TFLOP/s of a large matrix product in 16 bits, and GB/s of a copy (read and written)."""
    side, numbers = (8192, 2**29) if GPU else (256, 2**20)
    found: Figures = {}
    for name in ("fp16", "bf16") if GPU else ("fp32",):
        a = torch.randn(side, side, device=DEVICE, dtype=DTYPES[name])
        found[f"{name} TFLOP/s"] = 2 * side**3 / seconds(partial(torch.matmul, a, a)) / 1e12
    x = torch.randn(numbers, device=DEVICE, dtype=torch.float16)
    y = torch.empty_like(x)
    found["copy GB/s"] = 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e9
    return found


def config(cell: Figures) -> UNetConfig:
    """The published network of a size; a small one on a CPU."""
    model = configs.load(f"imagenet{cell['size']}").model if GPU else SMALL
    assert isinstance(model, UNetConfig)
    return model


def system(cell: Figures) -> Net:
    """The network of a cell's system, on the device, in its precision."""
    return nets.drawn(_published(cell))


def _published(cell: Figures) -> Net:
    name, model, half = cell["system"], config(cell), cell["precision"]
    if name.startswith("guided-diffusion"):
        with DEVICE:
            net = nets.guided_diffusion(model, path=Path(cell["path"]), fp16=half == "fp16")
        net.module.to(DEVICE)
        return net
    if name.startswith("diffusers"):
        with DEVICE:
            net = nets.diffusers(model)
        layout = torch.channels_last if "channels last" in name else torch.contiguous_format
        module: Any = net.module  # the stubs of `Module.to` lack memory_format
        module.to(DEVICE, DTYPES[half], memory_format=layout)
        return net
    layout = torch.contiguous_format if "channels first" in name else torch.channels_last
    kernels: Kernels = "fused" if "fused" in name and GPU else "plain"
    doubled = nets.DOUBLED.get(name.split(", ")[-1])
    with DEVICE:
        net = nets.ours(model, kernels=kernels, layout=layout, doubled=doubled)
    net.module.to(DEVICE, DTYPES[half])
    return net


def step(cell: Figures) -> Figures:
    """Images per second of a training step at the cell's images, or at the most that fit below.

    Forward pass, loss, backward pass and fused AdamW on the parameters as they are: the same for
    every system, without an engine. "host ms" is until the last kernel of a step is launched; the
    driver takes some 1,000 ahead, so it is the host's own time only where that limits the step.
    """
    images = cell["images"] if GPU else 2
    while images:
        try:
            return _step(cell, images=images)
        except torch.OutOfMemoryError:
            images //= 2
        # Not in the handler, where the error still holds the tensors of the step.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    raise MemoryError("not even one image fits")


def _step(cell: Figures, *, images: int) -> Figures:
    model, half = config(cell), DTYPES[cell["precision"]]
    torch.backends.cudnn.benchmark = True
    net = system(cell)
    if "compiled" in cell["system"]:
        # CUDA graphs of the forward and of the backward pass of every part, or an error.
        inductor.triton.cudagraphs = inductor.triton.cudagraph_or_error = "graphs" in cell["system"]
        # Kernels launched from C++ instead of Python.
        inductor.cpp_wrapper = "C++" in cell["system"]
        if inductor.cpp_wrapper:
            get_cpp_compiler()  # or an error, ahead of minutes of compilation
        net = _compiled(net)
    optimizer = torch.optim.AdamW(net.module.parameters(), lr=1e-6, fused=GPU)
    x, t, y = nets.inputs(model, images=images, device=DEVICE)
    x = x.to(half) if cell["system"].startswith("diffusers") else x

    def once() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        (found := loss(net.forward(x, t, y))).backward()
        optimizer.step()
        optimizer.zero_grad()
        return found

    began = time.perf_counter()
    once()
    _wait()
    first = time.perf_counter() - began
    # CUDA graphs are recorded by the second step, or the third.
    each = seconds(once, least=3.0, warm_up=4)
    began = time.perf_counter()
    last = once()
    host = time.perf_counter() - began
    if not last.isfinite():
        raise ValueError("the loss is not finite, so this measures no training")
    return {
        "images": images,
        "images/s": images / each,
        "model TFLOP/s": 3 * costs.of_network(model).forward_flops * images / each / 1e12,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if GPU else None,
        "host ms": 1e3 * host,
        "first step s": first,
    }


def loss(out: Tensor) -> Tensor:
    """A scalar, scaled so that its gradients neither vanish in fp16 nor are too large for it."""
    return 2**10 * out.float().square().mean()


def _compiled(net: Net) -> Net:
    """A network that compiles at its first call: ours as in training and drawing."""
    backend = "inductor" if GPU else "aot_eager"
    if isinstance(net.module, Network):
        compute.compile_forward(net.module, say=lambda _: None, backend=backend)
        return net
    return replace(net, forward=torch.compile(net.forward, backend=backend, dynamic=False))


def norm(cell: Figures) -> Figures:
    """GB/s of the norm with its conditioning and activation: map read twice and written forward.

    Backward: the map and the gradient read twice, and one written.
    """
    channels, size, images = cell["shape"] if GPU else (64, 8, 2)
    op = GroupNorm(channels).to(DEVICE, DTYPES[cell["precision"]])
    use_kernels(op, cell["kernels"] if GPU else "plain")
    half = DTYPES[cell["precision"]]
    x = torch.randn(images, channels, size, size, device=DEVICE, dtype=half)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    film = torch.randn(images, 2 * channels, device=DEVICE, dtype=half).requires_grad_()

    def both() -> None:
        out = op(x, film, silu=True)
        torch.autograd.grad(out, (x, film, *op.parameters()), out.detach())

    with torch.no_grad():
        forward = alone(lambda: op(x, film, silu=True))
    whole = alone(both)
    return {
        "forward GB/s": 3 * x.nbytes / forward / 1e9,
        "backward GB/s": 5 * x.nbytes / max(whole - forward, 1e-9) / 1e9,
    }


def attention(cell: Figures) -> Figures:
    """Milliseconds of attention, forward and backward, by backend."""
    length, heads, images = cell["shape"] if GPU else (16, 1, 1)
    half = DTYPES[cell["precision"]]
    qkv = torch.randn(images, length, 3, heads, 64, device=DEVICE, dtype=half, requires_grad=True)
    found: Figures = {}
    backends = torch.nn.attention.SDPBackend
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if GPU else ("MATH",)

    def both() -> None:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out: Tensor = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, qkv, out.detach())

    for name in names:
        try:
            with torch.nn.attention.sdpa_kernel(getattr(backends, name)):
                found[f"{name} ms"] = 1e3 * alone(both)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


def guided(cell: Figures) -> Figures:
    """Images per second of 25 guided denoising steps: the guide's gradient and the network."""
    net, guide = system(cell), nets.drawn(_guide(cell))
    net.module.eval().requires_grad_(False)
    images = cell["images"] if GPU else 2
    if "compiled" in cell["system"]:
        net, guide = _compiled(net), _compiled(guide)
    noise, t, y = nets.inputs(config(cell), images=images, device=DEVICE)

    gradient = classifier_guidance(lambda x, t: guide.forward(x, t, y), y, scale=1.0)

    def draw() -> None:
        x = noise
        for _ in range(25 if GPU else 2):
            out = net.forward(x, t, y)[:, :3].float()
            x = x - 0.01 * (out - 0.1 * gradient(x, t).float())

    with torch.no_grad():
        each = seconds(draw, warm_up=1)
    return {"images": images, "images/s": images / each}


def _guide(cell: Figures) -> Net:
    """The classifier of a size: guided-diffusion's own for its network."""
    model: Any = configs.load(f"classifier{cell['size']}").model
    if not GPU:
        small = {"image_size": 16, "channels": 32, "channel_mult": (1, 2), "attention": (8,)}
        model = replace(model, **small, head_channels=32, num_classes=10)
    if cell["system"] == "guided-diffusion":
        # Its attention asks for the gradients of its parameters, wanted or not.
        net = nets.guided_diffusion_classifier(model, path=Path(cell["path"]))
    else:
        net = build(model).requires_grad_(False)
        use_kernels(net, "fused" if GPU else "plain")
        net.to(dtype=DTYPES[cell["precision"]])
    net.to(DEVICE).eval()
    return Net(net, lambda x, t, _: net(x, t))


KINDS = {
    "ceilings": ceilings, "step": step, "norm": norm, "attention": attention, "guided": guided,
}  # fmt: skip
