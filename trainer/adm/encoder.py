"""The encoder that the UNet and the classifier share: from pixels down to the smallest map.

Paper, section 3: levels of residual blocks, attention at some resolutions, resampling between
levels. What comes out of every stage is kept, for the skip connections or the pooling head.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.adm.blocks import (
    AttentionBlock,
    Downsample,
    Resampling,
    ResidualBlock,
    Stage,
    Upsample,
    timestep_embedding,
)
from trainer.adm.config import EncoderConfig


class Network(nn.Module):
    """What a run trains: called with images (B, 3, H, W), timesteps (B,) and what it is told of
    the images, by name; its output is fp32, whatever the dtype of its parameters.
    """

    #: The methods that make up the forward pass, in their order. Compiled each by itself, the
    #: backward pass hands over the gradients of one before it computes those of the next.
    parts: tuple[str, ...]


class Encoder(Network):
    """The half that both nets share: embedding of t, downward stages, bottom.

    The upper half of the levels, with the large maps, has most of the computing; the lower half has
    most of the weights.
    """

    #: How maps lie in memory, from the first convolution on.
    layout = torch.channels_last

    def __init__(self, config: EncoderConfig, *, in_channels: int) -> None:
        super().__init__()
        self.channels = config.channels
        width = config.emb_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        stages, self.feature_channels = input_stages(config, in_channels=in_channels)
        self.input_blocks = nn.ModuleList(stages)
        self.upper = len(config.level_channels) // 2 * (config.blocks + 1)
        bottom = config.level_channels[-1]
        self.middle_block = Stage(
            [
                residual(config, bottom, out_channels=bottom),
                attention(config, bottom, resolution=config.resolutions[-1]),
                residual(config, bottom, out_channels=bottom),
            ]
        )

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, in which activations flow."""
        return next(self.parameters()).dtype

    def embed(self, t: Tensor) -> Tensor:
        """t (B,) in original timesteps -> (B, 4 * channels)."""
        emb: Tensor = self.time_embed(timestep_embedding(t, width=self.channels).to(self.dtype))
        return emb

    def upper_down(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From an image (B, C, H, W) to the lower half, and what came of each stage."""
        # The parameters stay contiguous: DeepSpeed broadcasts and flattens them.
        x = x.to(self.dtype, memory_format=self.layout)
        return run(list(self.input_blocks)[: self.upper], x, emb)

    def lower_down(self, h: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From there to the bottom's map, and what came of each stage above it."""
        h, features = run(list(self.input_blocks)[self.upper :], h, emb)
        return self.middle_block(h, emb), features


def run(stages: Sequence[nn.Module], h: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output (B, C, H, W) of the last stage, and that of each."""
    features = []
    for stage in stages:
        h = stage(h, emb)
        features.append(h)
    return h, features


def input_stages(config: EncoderConfig, *, in_channels: int) -> tuple[list[Stage], list[int]]:
    """The downward stages and the channels that each puts out."""
    width = config.level_channels[0]
    stages, widths = [Stage([nn.Conv2d(in_channels, width, 3, padding=1)])], [width]
    levels = list(zip(config.level_channels, config.resolutions, strict=True))
    for level, (out_channels, resolution) in enumerate(levels):
        for _ in range(config.blocks):
            stage = Stage([residual(config, width, out_channels=out_channels)])
            width = out_channels
            if resolution in config.attention:
                stage.append(attention(config, width, resolution=resolution))
            stages.append(stage)
            widths.append(width)
        if level < len(levels) - 1:
            stages.append(Stage([resampler(config, width, direction="down")]))
            widths.append(width)
    return stages, widths


def residual(
    config: EncoderConfig, channels: int, *, out_channels: int, resample: Resampling = "same"
) -> ResidualBlock:
    """A residual block as the configuration wants it."""
    return ResidualBlock(
        channels,
        out_channels=out_channels,
        emb_channels=config.emb_channels,
        conditioning=config.conditioning,
        dropout=config.dropout,
        rescale=config.rescale_residuals,
        resample=resample,
        checkpoint=config.checkpoint,
    )


def attention(
    config: EncoderConfig, channels: int, *, resolution: int, heads: int | None = None
) -> AttentionBlock:
    """Attention at `resolution`, local where the configuration says so."""
    return AttentionBlock(
        channels,
        heads=heads or config.heads_at(channels),
        order=config.qkv,
        window=config.local_window if resolution in config.local_attention else None,
        rescale=config.rescale_residuals,
        checkpoint=config.checkpoint,
    )


def resampler(
    config: EncoderConfig, channels: int, *, direction: Literal["up", "down"]
) -> nn.Module:
    """What changes the resolution between two levels."""
    if config.resample == "biggan":
        return residual(config, channels, out_channels=channels, resample=direction)
    conv = config.resample == "conv"
    return Downsample(channels, conv=conv) if direction == "down" else Upsample(channels, conv=conv)
