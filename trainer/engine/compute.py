"""How a network computes on a device: by which kernels, compiled or not, and in TF32 or not.

Its weights and their names stay the same, so a run may change these settings when it resumes.
"""

import importlib.util
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from data.pool import cpus
from trainer.adm.encoder import Network
from trainer.adm.norm import use_kernels
from trainer.config.sections import TrainingConfig
from trainer.engine import caches

#: The numbers of each precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(training: TrainingConfig) -> None:
    """Raise ValueError unless this machine has what the settings need: packages, and directories
    for what is compiled.
    """
    caches.check_made()
    settings = {
        'training.kernels = "fused"': training.kernels == "fused",
        "training.compile = true": training.compile,
    }
    named = next((name for name, is_set in settings.items() if is_set), None)
    if named is None or not torch.cuda.is_available():
        return
    without = 'or set training.kernels = "plain" and training.compile = false'
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{named}: needs the package triton, which is not installed: install it "
            f"(`pip install triton`), {without}"
        )
    if missing := _missing_tool():
        raise ValueError(
            f"{named}: needs {missing}, with which Triton compiles its launchers: install gcc and "
            f"Python's headers (Debian: apt-get install gcc python3-dev), {without}"
        )
    caches.check(caches.TRITON, *[caches.INDUCTOR] * training.compile)


def _missing_tool() -> str:
    """What Triton lacks to compile C, as container images without a compiler do; or "".

    Nothing where an earlier start has left in the cache what it compiles first.
    """
    if any(caches.directory(caches.TRITON).glob("*/*_utils*.so")):
        return ""
    if named := os.environ.get("CC"):
        return "" if shutil.which(named) else f"the compiler of CC = {named!r}, which is not here"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler (there is no gcc in PATH)"
    header = Path(sysconfig.get_paths("posix_prefix")["include"], "Python.h")
    return "" if header.exists() else str(header)


def remarks(training: TrainingConfig, *, stage: int, ranks: int) -> list[str]:
    """What the log says where this machine or ZeRO stage computes otherwise than set."""
    said = []
    if training.kernels == "fused" and not torch.cuda.is_available():
        said.append('training.kernels = "fused" needs a GPU: this run computes with "plain"')
    if training.precision == "fp16" and not torch.cuda.is_available():
        said.append(
            'training.precision = "fp16" is some 50 times slower on a CPU than "fp32": '
            "--set 'training.precision = \"fp32\"'"
        )
    threads, own = torch.get_num_threads(), cpus()
    if threads > own and not torch.cuda.is_available():
        said.append(f"torch uses {threads} threads on {own} CPUs: set OMP_NUM_THREADS={own}")
    several = training.batch > ranks * training.micro_batch_on(ranks)
    if training.precision == "bf16" and stage == 1 and several:
        said.append(
            "ZeRO-1 adds up the gradients of micro-batches in bf16, which loses digits; ZeRO-2 and "
            "3 add them up in fp32"
        )
    if training.compile and not torch.cuda.is_available():
        said.append("training.compile needs a GPU: this run computes uncompiled")
    elif training.compile and stage == 3:
        said.append(
            "training.compile: ZeRO-3 gathers weights within the forward pass, which cannot be "
            "compiled: this run computes uncompiled"
        )
    elif training.compile and (name := _switched_off()):
        said.append(f"training.compile: {name} = 1 switches it off: this run computes uncompiled")
    return said


def _switched_off() -> str | None:
    """The variable that tells torch to compile nothing, if one is set."""
    names = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
    return next((name for name in names if os.environ.get(name) == "1"), None)


def use_tf32(is_wanted: bool) -> None:
    """Let a GPU round the factors of fp32 products to 10 bits from now on, or not.

    By torch's older settings: inductor reads them, and fails where only newer ones were set.
    """
    torch.backends.cuda.matmul.allow_tf32 = is_wanted
    torch.backends.cudnn.allow_tf32 = is_wanted


def is_compiled(training: TrainingConfig, *, device: torch.device, stage: int) -> bool:
    """Whether the steps of a run there are compiled; its replays, grids and validation are not."""
    return device.type == "cuda" and training.compile and stage != 3 and not _switched_off()


def prepare(
    net: nn.Module,
    *,
    training: TrainingConfig,
    device: torch.device,
    stage: int = 0,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """The network, to compute on `device` as the settings say.

    It is compiled at its first call if `say` is given, which hears when that begins and ends.
    """
    fast = device.type == "cuda"
    if fast:
        os.environ[caches.TRITON] = str(caches.directory(caches.TRITON))
        use_tf32(training.tf32)
    use_kernels(net, training.kernels if fast else "plain")
    if say is not None and is_compiled(training, device=device, stage=stage):
        compile_forward(net, say=say)
    return net


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute in full fp32 inside of it, whatever is set outside."""
    outside = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = outside


def compile_forward(
    net: nn.Module, *, say: Callable[[str], None], backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Let a network compile its forward pass at its first call, and the backward pass with it.

    Each part by itself: what is compiled hands over its gradients when all of them are there, and
    ranks reduce those of one part while they compute the next. DeepSpeed's hooks around the forward
    pass cannot be compiled, so the network itself is not replaced.
    """
    assert isinstance(net, Network)
    options = _inductor_options() if backend == "inductor" else None
    for name in net.parts:
        part = torch.compile(
            getattr(net, name), backend=backend, fullgraph=True, dynamic=False, options=options
        )
        setattr(net, name, part)
    net.forward = _Compiled(net.forward, say=say)


def _inductor_options() -> dict[str, Any]:
    from torch._inductor.lowering import needs_realized_inputs

    # Or a map that two of our kernels read would be written for each of them.
    needs_realized_inputs.add(torch.ops.higher_order.triton_kernel_wrapper_mutation)
    # A kind of kernel that has returned wrong gradients in silence (pytorch#190796, #193061).
    return {"triton.mix_order_reduction": False}


class _Compiled:
    """A forward pass that is compiled for the number of images of its first call.

    Fewer images, as in the last batch, are filled up to it.
    """

    def __init__(self, forward: Callable[..., Tensor], *, say: Callable[[str], None]) -> None:
        self._forward, self._say, self._images = forward, say, 0

    def __call__(self, *inputs: Tensor | None, **named: Tensor | None) -> Tensor:
        """The output for inputs (B, ...)."""
        count = len(inputs[0])  # type: ignore[arg-type]
        if not self._images:
            return self._first(count, inputs, named)
        missing = self._images - count
        if missing > 0:
            inputs = tuple(_filled(value, missing) for value in inputs)
            named = {name: _filled(value, missing) for name, value in named.items()}
        out: Tensor = self._forward(*inputs, **named)
        return out[:count] if missing > 0 else out

    def _first(self, count: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        self._say("compiling the network, which takes minutes")
        began = time.monotonic()
        # The backward pass too, which would be compiled at its first call, after this is said.
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            out: Tensor = self._forward(*inputs, **named)
        self._images = count
        self._say(f"compiled the network in {time.monotonic() - began:.0f} s")
        return out


def _filled(value: Tensor | None, missing: int) -> Tensor | None:
    """An input (B, ...) with its last row repeated so many times."""
    if value is None:
        return None
    return torch.cat((value, value[-1:].expand(missing, *value.shape[1:])))
