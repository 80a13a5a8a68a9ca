"""The fused norm's kernels compiled for an H100, on a machine without one: `python -m` this.

Prints registers and spilled bytes of every kernel, and how the compiler sees the operations, as
JSON. Optional arguments: elements that a
program holds, and its warps (default: those of `trainer.adm.fused`).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from trainer.adm import fused, kernels

HALF, FULL = "*fp16", "*fp32"
COEFFICIENTS = {"weight": HALF, "bias": HALF, "film": HALF, "shift": HALF}
SAVED = {"x": HALF, "mean": FULL, "rstd": FULL, **COEFFICIENTS}
POINTERS = {
    "channel_moments": {"x": HALF, "means": FULL, "squares": FULL},
    "group_moments": {"means": FULL, "squares": FULL, "shift": HALF, "mean": FULL, "rstd": FULL},
    "apply": {"y": HALF, **SAVED},
    "channel_gradients": {"dy": HALF, "sums": FULL, **SAVED},
    "group_gradients": {
        "sums": FULL,
        "means": FULL,
        "rstd": FULL,
        "dfilm": HALF,
        "dparameters": FULL,
    }
    | COEFFICIENTS,
    "apply_gradient": {"dy": HALF, "dx": HALF, "means": FULL, **SAVED},
}
TARGET = GPUTarget("cuda", 90, 32)
PTXAS = get_ptxas(TARGET.arch).path


def cost(name: str, *, channels: int, length: int) -> dict[str, object]:
    """Registers and spilled bytes of a kernel for maps of so many channels and positions."""
    cut = fused.Cut(8, channels, length, 32)
    block = cut.sums if name.startswith("channel_") else cut.block
    values = {
        **block,
        **cut.group,
        "eps": 1e-5,
        "FILM": True,
        "SHIFT": True,
        "SILU": True,
        "F": tl.float32,
    }
    kernel = getattr(kernels, name)
    constants = {n: values[n] for n in kernel.arg_names if n in values}
    signature = {
        n: "constexpr" if n in constants else POINTERS[name].get(n, "i32")
        for n in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": fused.WARPS}
    ptx = triton.compile(source, target=TARGET, options=options).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.search(pattern, said)[1])  # type: ignore[index]
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return {"kernel": name, "channels": channels, "registers": registers, "spilled": spilled}


def seen() -> dict[str, list[object]]:
    """What each kernel writes as the compiler sees it, forward and backward; and its other work."""
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET))
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.empty(shape, device="cuda", dtype=dtype)

        x, weight, film = empty(8, 64, 16, 16), empty(64), empty(8, 128)
        x, mean = x.to(memory_format=fused.LAYOUT), empty(8, 32, dtype=torch.float32)
        given = (weight, weight, film, weight)
        nodes = [
            *_traced(lambda *a: fused.norm(*a, 32, 1e-5, True), x, *given),
            *_traced(lambda *a: fused.norm_backward(*a, True), x, x, mean, mean, *given),
        ]
    written = [node.kwargs["tensors_to_clone"] for node in nodes if "kwargs" in node.kwargs]
    others = {node.target.__name__ for node in nodes if "kwargs" not in node.kwargs}
    return {"written": written, "others": sorted(others)}


def _traced(function: Callable[..., object], *inputs: Tensor) -> list[torch.fx.Node]:
    """The operations of a function as they come to the compiler."""
    nodes = make_fx(dispatch_functionalize(function))(*inputs).graph.nodes
    return [node for node in nodes if node.op == "call_function"]


def main() -> None:
    """Compile everything for the smallest and the largest blocks of channels."""
    if len(sys.argv) > 1:
        fused.ELEMENTS, fused.WARPS = int(sys.argv[1]), int(sys.argv[2])
    shapes = ((192, 4096), (1536, 64))
    costs = [cost(n, channels=c, length=s) for n in POINTERS for c, s in shapes]
    print(json.dumps({"costs": costs, **seen()}))


if __name__ == "__main__":
    main()
