"""Conversion to and from diffusers' UNet2DModel: its options, and its names of our weights.

It is exact. Networks that UNet2DModel cannot express are refused, naming the setting.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adm.config import ClassifierConfig, NetworkConfig, UNetConfig, check
from trainer.config.experiment import Config

Weights = dict[str, Tensor]

_NAME = "diffusion_pytorch_model"
#: The weights file in a folder that we write.
FILE = f"unet/{_NAME}.safetensors"
# Where folders of others have it: those of a pipeline, and those of a model alone.
_FILES = [f"{place}{_NAME}.{end}" for place in ("unet/", "") for end in ("safetensors", "bin")]

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def options(config: NetworkConfig) -> dict[str, Any]:
    """The options of `diffusers.UNet2DModel` for this network; errors as `assert_expressible`."""
    assert_expressible(config)
    assert isinstance(config, UNetConfig)
    resample, down, up = "conv", "DownBlock2D", "UpBlock2D"
    if config.resample == "biggan":
        resample, down, up = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    attends = [size in config.attention for size in config.resolutions]
    widths = config.level_channels
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attends)],
        "block_out_channels": list(widths),
        "layers_per_block": config.blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": config.head_channels or widths[-1] // config.heads_at(widths[-1]),
        "attn_norm_num_groups": 32,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.conditioning == "adagn" else "default",
        "act_fn": "silu",
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": config.num_classes,
    }


def find(folder: Path) -> Path | None:
    """The weights file in a folder of diffusers; None where there is none."""
    return next((file for name in _FILES if (file := folder / name).is_file()), None)


def assert_expressible(config: NetworkConfig) -> None:
    """Raise ValueError, naming the setting, unless diffusers' UNet2DModel can be this network."""
    if isinstance(config, ClassifierConfig):
        raise ValueError('objective = "classify": diffusers has no classifier of noised images')
    expressible = "for diffusers, which has no other"
    mult, conditioning = config.channel_mult, config.conditioning
    check(mult[0] == 1, "model.channel_mult", mult, f"1 at the first level {expressible}")
    known = conditioning in ("adagn", "add")
    check(known, "model.conditioning", conditioning, f'"adagn" or "add" {expressible}')
    rescaled = config.rescale_residuals
    check(not rescaled, "model.rescale_residuals", rescaled, f"false {expressible}")
    local = config.local_attention
    check(not local, "model.local_attention", local, f"empty {expressible}")
    resample = config.resample
    check(resample != "pool", "model.resample", resample, f'"biggan" or "conv" {expressible}')
    levels = zip(config.level_channels, config.resolutions, strict=True)
    widths = {width for width, size in levels if size in config.attention}
    one = config.heads is None or len(widths | {config.level_channels[-1]}) == 1
    check(one, "model.heads", config.heads, "absent, with model.head_channels, " + expressible)
    same = config.heads_up in (None, config.heads)
    check(same, "model.heads_up", config.heads_up, f"model.heads or absent {expressible}")


def to_diffusers(weights: Mapping[str, Tensor], *, config: UNetConfig) -> Weights:
    """Our weights under diffusers' names."""
    left, named = dict(weights), Weights()
    for ours, theirs, kind in _places(config):
        for end in ("weight", "bias"):
            value = left.pop(f"{ours}.{end}", None)
            if value is None:
                continue
            if kind == "qkv":
                for letter, part in zip("qkv", _split(value, config=config), strict=True):
                    named[f"{theirs}.to_{letter}.{end}"] = part
            else:
                named[f"{theirs}.{end}"] = value.squeeze(-1) if kind == "projection" else value
    assert not left, f"no place in diffusers' network: {', '.join(left)}"
    return named


def from_diffusers(weights: Mapping[str, Tensor], *, config: UNetConfig) -> Weights:
    """Weights of diffusers' UNet2DModel under our names.

    Weights that this network has no place for keep their names, so that `trainer.weights.check_fit`
    names them, and those that are missing.
    """
    left, named = dict(weights), Weights()
    for ours, theirs, kind in _places(config):
        for end in ("weight", "bias"):
            wanted = [f"{theirs}.{end}"]
            if kind == "qkv":
                wanted = [f"{theirs}.to_{letter}.{end}" for letter in "qkv"]
            values = [weights[name] for name in wanted if name in weights]
            if len(values) < len(wanted) or (kind == "qkv" and not _joins(values, config=config)):
                continue
            value = _join(values, config=config) if kind == "qkv" else values[0]
            is_matrix = kind in ("qkv", "projection") and end == "weight"
            named[f"{ours}.{end}"] = value[..., None] if is_matrix else value
            for name in wanted:
                del left[name]
    return named | left


def ours(weights: Mapping[str, Tensor], *, config: NetworkConfig) -> Weights:
    """Weights that have diffusers' names, or ours already, under our names.

    Raises:
        ValueError: diffusers cannot express the network.
    """
    if "conv_in.weight" not in weights:
        return dict(weights)
    assert_expressible(config)
    assert isinstance(config, UNetConfig)
    return from_diffusers(weights, config=config)


def _places(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """Every layer: our name, diffusers' name, and the kind: "plain", "qkv" or "projection"."""
    for ours, theirs in _ENDS.items():
        yield ours, theirs, "plain"
    for ours, theirs, kind in _modules(config):
        if kind == "attention":
            yield f"{ours}.norm", f"{theirs}.group_norm", "plain"
            yield f"{ours}.qkv", theirs, "qkv"
            yield f"{ours}.proj_out", f"{theirs}.to_out.0", "projection"
        elif kind == "conv":
            yield ours, theirs, "plain"
        else:
            for inner, name in _RES.items():
                if inner != "skip_connection" or kind == "residual with shortcut":
                    yield f"{ours}.{inner}", f"{theirs}.{name}", "plain"


def _modules(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """Every residual block, attention and resampling convolution: our name, theirs, and kind."""
    yield from _downward(config)
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        kind = "attention" if i == 1 else "residual"
        yield f"middle_block.{i}", f"mid_block.{name}", kind
    yield from _upward(config)


def _downward(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    width, last = config.level_channels[0], len(config.level_channels) - 1
    for level, own in enumerate(config.level_channels):
        first, there = 1 + level * (config.blocks + 1), f"down_blocks.{level}"
        for i in range(config.blocks):
            kind = "residual" if width == own else "residual with shortcut"
            yield f"input_blocks.{first + i}.0", f"{there}.resnets.{i}", kind
            width = own
            if config.resolutions[level] in config.attention:
                yield f"input_blocks.{first + i}.1", f"{there}.attentions.{i}", "attention"
        if level < last:
            here = f"input_blocks.{first + config.blocks}.0"
            yield _resampling(config, here, f"{there}.downsamplers.0", conv="op")


def _upward(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    each = config.blocks + 1
    for up, level in enumerate(reversed(range(len(config.level_channels)))):
        there, attends = f"up_blocks.{up}", config.resolutions[level] in config.attention
        for i in range(each):
            here = f"output_blocks.{up * each + i}"
            # With the skip connection's channels, the input is always wider than the output.
            yield f"{here}.0", f"{there}.resnets.{i}", "residual with shortcut"
            if attends:
                yield f"{here}.1", f"{there}.attentions.{i}", "attention"
        if level > 0:
            here = f"output_blocks.{up * each + each - 1}.{2 if attends else 1}"
            yield _resampling(config, here, f"{there}.upsamplers.0", conv="conv")


def _resampling(config: UNetConfig, here: str, there: str, *, conv: str) -> tuple[str, str, str]:
    if config.resample == "biggan":
        return here, there, "residual"
    return f"{here}.{conv}", f"{there}.conv", "conv"


def _split(value: Tensor, *, config: UNetConfig) -> tuple[Tensor, ...]:
    """q, k and v of a qkv layer's weight (3 C, C, 1) or bias (3 C,)."""
    rows = value.squeeze(-1) if value.dim() == 3 else value
    if config.qkv == "new":
        return rows.chunk(3)
    heads = config.heads_at(len(rows) // 3)
    parts = rows.unflatten(0, (heads, 3, -1))
    return tuple(parts[:, i].flatten(0, 1) for i in range(3))


def _joins(parts: list[Tensor], *, config: UNetConfig) -> bool:
    """Whether q, k and v have one shape, and the heads of this network divide their width."""
    width = len(parts[0])
    by = config.head_channels or config.heads or 1
    return len({part.shape for part in parts}) == 1 and width % by == 0


def _join(parts: list[Tensor], *, config: UNetConfig) -> Tensor:
    """The weight or bias of a qkv layer from those of q, k and v."""
    if config.qkv == "new":
        return torch.cat(parts)
    heads = config.heads_at(len(parts[0]))
    return torch.stack([p.unflatten(0, (heads, -1)) for p in parts], dim=1).flatten(0, 2)


def scheduler(config: Config) -> dict[str, Any]:
    """The options of diffusers' DDPMScheduler that step as our ancestral sampler does."""
    diffusion = config.diffusion
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    predictions = {"eps": "epsilon", "x0": "sample"}
    learned = diffusion.variance == "learned"
    # The reference scales the linear betas of fewer steps.
    scale = 1000 / diffusion.steps
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.steps,
        "beta_schedule": schedules[diffusion.schedule],
        "beta_start": 0.0001 * scale,
        "beta_end": 0.02 * scale,
        "variance_type": "learned_range" if learned else diffusion.variance,
        "prediction_type": predictions[diffusion.predict],
        "clip_sample": True,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
    }
