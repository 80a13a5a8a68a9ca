"""The recorded values of tests/goldens, and the formula that stands in for stored weights."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.adm.config import ClassifierConfig, UNetConfig
from trainer.adm.unet import Classifier, UNet

FOLDER = Path(__file__).parent.parent / "goldens"


def table(name: str) -> Any:
    """One of the JSON files."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """One of the safetensors files."""
    return load_file(FOLDER / f"{name}.safetensors")


def wave(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """v[i] = sin(0.7310585 i + crc32(name) mod 10007) * scale, float32 of a float64 value."""
    phase = np.arange(np.prod(shape), dtype=np.float64) * 0.7310585 + crc32(name.encode()) % 10007
    return torch.from_numpy((np.sin(phase) * scale).astype(np.float32)).reshape(shape)


def set_formula_weights(net: nn.Module) -> None:
    """Fills every parameter with the wave of its state-dict key."""
    for name, parameter in net.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            value = wave(name, shape, 0.1) + (1.0 if name.endswith("weight") else 0.0)
        else:
            value = wave(name, shape, 1.5 / np.prod(shape[1:]) ** 0.5)
        parameter.data.copy_(value)


def assert_close(got: Tensor, want: Tensor, *, tolerance: float) -> None:
    """Agreement relative to the largest magnitude of `want`."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2),
}


def unet_config(flags: dict[str, Any]) -> UNetConfig:
    """The UNet of the reference's own flags; for `superres` those with `large_size`."""
    size = flags.get("image_size") or flags["large_size"]
    upsampler = "large_size" in flags
    mult = (1, 1, 2, 2, 4, 4) if upsampler and size >= 256 else _CHANNEL_MULT.get(size)
    head_channels = flags.get("num_head_channels")
    return UNetConfig(
        image_size=size,
        channels=flags["num_channels"],
        channel_mult=_numbers(flags.get("channel_mult")) or mult or (),
        blocks=flags["num_res_blocks"],
        attention=_numbers(flags["attention_resolutions"]),
        heads=None if head_channels else flags.get("num_heads", 4),
        head_channels=head_channels,
        qkv="new" if flags.get("use_new_attention_order") else "legacy",
        resample="biggan" if flags["resblock_updown"] else "conv",
        conditioning="adagn" if flags["use_scale_shift_norm"] else "add",
        dropout=flags.get("dropout", 0.0),
        num_classes=1000 if flags["class_cond"] else None,
        small_size=flags.get("small_size"),
        learn_sigma=flags["learn_sigma"],
    )


def classifier_config(flags: dict[str, Any]) -> ClassifierConfig:
    """The classifier of the reference's own flags."""
    return ClassifierConfig(
        image_size=flags["image_size"],
        channels=flags["classifier_width"],
        channel_mult=_CHANNEL_MULT[flags["image_size"]],
        blocks=flags["classifier_depth"],
        attention=_numbers(flags["classifier_attention_resolutions"]),
        head_channels=64,
        resample="biggan" if flags["classifier_resblock_updown"] else "conv",
        conditioning="adagn" if flags["classifier_use_scale_shift_norm"] else "add",
        pool=flags["classifier_pool"],
        num_classes=1000,
    )


def build(kind: str, flags: dict[str, Any]) -> UNet | Classifier:
    """The net of a golden case or of a published model."""
    if kind == "classifier":
        return Classifier(classifier_config(flags))
    return UNet(unet_config(flags))


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()
