"""The fused norm's kernels compiled for an H100, on a machine without one: `python -m` this.

Prints registers and spilled bytes of every kernel, as JSON. Optional arguments: elements that a
program holds, and its warps (default: those of `trainer.adm.fused`).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
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
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


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
    target = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
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


def main() -> None:
    """Compile everything for the smallest and the largest blocks of channels."""
    if len(sys.argv) > 1:
        fused.ELEMENTS, fused.WARPS = int(sys.argv[1]), int(sys.argv[2])
    shapes = ((192, 4096), (1536, 64))
    print(json.dumps([cost(n, channels=c, length=s) for n in POINTERS for c, s in shapes]))


if __name__ == "__main__":
    main()
