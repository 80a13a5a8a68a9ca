"""Weights in files: loading those of any origin, and filling a network with them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class NotWeightsError(ValueError):
    """A checkpoint's file of another kind."""


def load(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a published `.pt` file (never unpickling code).

    Raises:
        ValueError: the file is missing or holds something else, such as a state of Adam.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such weights file: {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                _check_kind(path, file.metadata() or {})
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except NotWeightsError:
        raise
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no weights file: {str(error).splitlines()[0]}") from None
    except Exception as error:  # torch raises pickle's own errors for unsafe or foreign files
        raise ValueError(f"{path} is no plain weights file: {type(error).__name__}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds {type(weights).__name__}, not a dict of tensors")
    return weights


def _check_kind(path: Path, metadata: Mapping[str, str]) -> None:
    """Return unless a checkpoint's file holds other tensors than weights.

    Raises:
        ValueError: it does.
    """
    # Files of version 0.1 say in their metadata only that they are a checkpoint's.
    kind = metadata.get("kind", path.stem if "images" in metadata else "model")
    if kind.startswith("adam"):
        raise NotWeightsError(
            f"{path} holds {kind}, a state of the optimizer: give an ema-* file, or model"
        )


def metadata(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says of itself.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no weights file: {str(error).splitlines()[0]}") from None


def fill(net: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load `weights` into `net`, strictly.

    Raises:
        ValueError: as `check_fit`.
    """
    check_fit(net, weights, source=source)
    net.load_state_dict(dict(weights))


def check_fit(net: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Return if `weights` are those of such a network, which may be on the meta device.

    Raises:
        ValueError: names or shapes are not those of the network.
    """
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source} does not fit the network of this preset: {'; '.join(wrong[:3])}{more}"
        )
