"""`training.deterministic`: a resumed run is the uninterrupted one bit for bit, on GPUs too.

On the same kind of GPU, software and number of ranks. Without it, on GPUs, some gradients are added
up in an order that differs from call to call. Not covered: another kind of GPU, driver, torch or
NCCL; another number of ranks, micro-batch or ZeRO stage; grids and samples, which no checkpoint
depends on.
"""

import os
from collections.abc import MutableMapping, Sequence

import torch

from trainer.config import experiment as configs

# Read by cuBLAS and NCCL when they are first used: before the config of a run is checked.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def prepare(
    preset: str,
    overrides: Sequence[str],
    *,
    unset: Sequence[str],
    env: MutableMapping[str, str] = os.environ,
) -> None:
    """Set what must be set before the ranks connect, if that config is to be deterministic.

    A config that cannot be read is refused later, by all ranks together.
    """
    try:
        is_wanted = configs.load(preset, overrides, unset=unset).training.deterministic
    except ValueError:
        return
    if is_wanted:
        env.update(_ENVIRONMENT)


def apply(is_wanted: bool) -> None:
    """Choose deterministic kernels, or the fastest."""
    torch.use_deterministic_algorithms(is_wanted)
    # What is not initialised is written before it is read here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = is_wanted
    # Measures the convolutions of each shape at its first use, and takes the fastest.
    torch.backends.cudnn.benchmark = not is_wanted
    # Flash and efficient attention have a deterministic backward pass; cuDNN's has not.
    torch.backends.cuda.enable_cudnn_sdp(not is_wanted)
