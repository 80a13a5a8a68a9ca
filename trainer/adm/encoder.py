"""The encoder that the UNet and the classifier share: from pixels down to the smallest map.

Paper, section 3: levels of residual blocks, attention at some resolutions, resampling between
levels. What comes out of every stage is kept, for the skip connections or the pooling head.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trainer.adm.blocks import (
    GROUPS,
    AttentionBlock,
    Conditioning,
    Downsample,
    QkvOrder,
    Resampling,
    ResidualBlock,
    Stage,
    Upsample,
    timestep_embedding,
)
from trainer.adm.checks import check, check_choice

Resample = Literal["biggan", "conv", "pool"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the UNet and the classifier share. `attention` and `local_attention` are resolutions.

    Level i has int(channels * channel_mult[i]) channels and half the resolution of level i - 1.
    Attention at a resolution in `local_attention` sees windows of `local_window` squared.
    Give `heads` or `head_channels`, not both. The bottom of the net always has attention.
    """

    image_size: int
    channels: int
    channel_mult: tuple[float, ...]
    blocks: int
    attention: tuple[int, ...]
    heads: int | None = None
    head_channels: int | None = None
    qkv: QkvOrder = "legacy"
    resample: Resample = "biggan"
    conditioning: Conditioning = "adagn"
    rescale_residuals: bool = False
    local_attention: tuple[int, ...] = ()
    local_window: int = 8
    dropout: float = 0.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_choice("model.qkv", self.qkv, get_args(QkvOrder))
        check_choice("model.resample", self.resample, get_args(Resample))
        check_choice("model.conditioning", self.conditioning, get_args(Conditioning))
        check(0 <= self.dropout < 1, f"model.dropout = {self.dropout}: choose from 0 up to below 1")
        check(self.blocks >= 1, f"model.blocks = {self.blocks}: at least 1 per level")
        self._check_levels()
        self._check_attention()
        self._check_heads()

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, the largest maps first."""
        return tuple(int(self.channels * mult) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height and width of every level's maps."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @property
    def emb_channels(self) -> int:
        """Width of the embedding of timestep and class."""
        return 4 * self.channels

    def heads_at(self, channels: int) -> int:
        """Number of attention heads on a map of so many channels."""
        if self.head_channels is not None:
            return channels // self.head_channels
        assert self.heads is not None
        return self.heads

    def attention_heads(self) -> tuple[int, ...]:
        """Every fixed number of heads in the net."""
        return () if self.heads is None else (self.heads,)

    def _check_levels(self) -> None:
        levels = len(self.channel_mult)
        check(levels >= 1, "model.channel_mult is empty: give one multiplier per level")
        check(
            self.image_size > 0 and self.image_size % (1 << (levels - 1)) == 0,
            f"model.image_size = {self.image_size}: not divisible by 2 for each of the "
            f"{levels} levels of model.channel_mult; use fewer levels or another size",
        )
        check(
            self.channels > 0 and self.channels % 2 == 0,
            f"model.channels = {self.channels}: choose a positive even number",
        )
        for mult in self.channel_mult:
            width = self.channels * mult
            check(
                width > 0 and width % GROUPS == 0,
                f"model.channels = {self.channels} with multiplier {mult} in model.channel_mult: "
                f"{width} channels; GroupNorm needs a multiple of {GROUPS}",
            )

    def _check_attention(self) -> None:
        for resolution in self.attention:
            check(
                resolution in self.resolutions,
                f"model.attention has {resolution}: the net's resolutions are {self.resolutions}",
            )
        for resolution in self.local_attention:
            check(
                resolution in self.attention,
                f"model.local_attention has {resolution}: add it to model.attention "
                f"= {self.attention} too",
            )
            check(
                self.local_window > 0 and resolution % self.local_window == 0,
                f"model.local_window = {self.local_window}: does not divide resolution "
                f"{resolution} of model.local_attention",
            )

    def _check_heads(self) -> None:
        check(
            (self.heads is None) != (self.head_channels is None),
            f"model.heads = {self.heads}, model.head_channels = {self.head_channels}: "
            "give one of the two",
        )
        widths = {self.level_channels[-1]} | {
            width
            for width, resolution in zip(self.level_channels, self.resolutions, strict=True)
            if resolution in self.attention
        }
        divisors = self.attention_heads() if self.head_channels is None else (self.head_channels,)
        for divisor in divisors:
            check(
                divisor >= 1 and all(width % divisor == 0 for width in widths),
                f"model.heads or model.head_channels = {divisor}: does not divide the "
                f"{sorted(widths)} channels of the maps with attention",
            )


class Encoder(nn.Module):
    """The half that both nets share: embedding of t, downward stages, bottom."""

    def __init__(self, config: EncoderConfig, *, in_channels: int) -> None:
        super().__init__()
        self.channels = config.channels
        width = config.emb_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        stages, self.feature_channels = input_stages(config, in_channels=in_channels)
        self.input_blocks = nn.ModuleList(stages)
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

    def encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """The output of every downward stage, first to last, and that of the bottom."""
        features = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            features.append(x)
        return features, self.middle_block(x, emb)


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
