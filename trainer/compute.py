"""How a network computes on a device: by which kernels. Its weights stay the same."""

import importlib.util

import torch
from torch import nn

from trainer.adm.norm import use_kernels
from trainer.sections import TrainingConfig


def check(training: TrainingConfig) -> None:
    """Return if this machine can compute as the settings say.

    Raises:
        ValueError: a package is missing.
    """
    wanted = training.kernels == "fused" and torch.cuda.is_available()
    if wanted and importlib.util.find_spec("triton") is None:
        raise ValueError(
            'training.kernels = "fused": needs the package triton, which is not installed: '
            'install it (`pip install triton`), or set "plain"'
        )


def prepare(net: nn.Module, *, training: TrainingConfig, device: torch.device) -> nn.Module:
    """The network, to compute on `device` as the settings say."""
    use_kernels(net, training.kernels if device.type == "cuda" else "plain")
    return net


def remarks(training: TrainingConfig) -> list[str]:
    """What the log says where this machine computes otherwise than set."""
    if training.kernels == "fused" and not torch.cuda.is_available():
        return ['training.kernels = "fused" needs a GPU: this run computes with "plain"']
    return []
