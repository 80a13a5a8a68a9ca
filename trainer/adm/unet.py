"""The nets: a noised image and its timestep go in; a noise estimate or class logits come out.

One encoder serves both. `UNet` adds the decoder with skip connections (paper, section 3), and
with `small_size` takes a low-resolution image beside its input (the upsamplers); `Classifier`
adds a pooling head (section 4). State-dict keys are those of the published checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adm.blocks import AttentionPool, Stage, zeroed
from trainer.adm.config import NO_LABEL, ClassifierConfig, NetworkConfig, UNetConfig
from trainer.adm.encoder import Encoder, attention, resampler, residual
from trainer.adm.norm import GroupNorm, full

_SPATIAL_WIDTH = 2048


class UNet(Encoder):
    """Predicts the noise (and with `learn_sigma` the variance) of a noised image."""

    parts = ("_enter", "_turn", "_leave")

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, in_channels=config.in_channels)
        self.config = config
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.emb_channels)
        self.output_blocks = nn.ModuleList(output_stages(config, skips=self.feature_channels))
        width = config.level_channels[0]
        self.out = nn.Sequential(
            GroupNorm(width), nn.SiLU(), zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))
        )

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """x (B, 3, H, W), t (B,) original timesteps, y (B,) labels, low_res (B, 3, h, w) -> fp32.

        A label may be `NO_LABEL`: the class adds nothing to the embedding then.
        The result is (B, 3, H, W): the prediction; with `learn_sigma` three more channels: the
        interpolation between the smallest and largest log variance, from -1 to 1.
        """
        assert (y is not None) == (self.config.num_classes is not None), "labels: all or none"
        assert (low_res is not None) == (self.config.small_size is not None), "low_res: all or none"
        h, emb, skips = self._enter(x, t, y, low_res)
        return self._leave(self._turn(h, emb), emb, skips)

    def _enter(
        self, x: Tensor, t: Tensor, y: Tensor | None, low_res: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        emb = self.embed(t)
        if y is not None:
            unknown = y == NO_LABEL
            known = (~unknown).to(emb.dtype)[:, None]
            emb = emb + self.label_emb(y.masked_fill(unknown, 0)) * known
        if low_res is not None:
            x = torch.cat((x, F.interpolate(low_res, x.shape[2:], mode="bilinear")), dim=1)
        h, skips = self.upper_down(x, emb)
        return h, emb, skips

    def _turn(self, h: Tensor, emb: Tensor) -> Tensor:
        h, skips = self.lower_down(h, emb)
        return join(list(self.output_blocks)[: len(skips)], h, emb, skips)

    def _leave(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        stages = list(self.output_blocks)[len(self.output_blocks) - len(skips) :]
        h = join(stages, h, emb, skips)
        norm, _, conv = self.out
        return full(conv(norm(h, silu=True)))


class Classifier(Encoder):
    """Class logits of a noised image, p(y | x_t)."""

    parts = ("_enter", "_leave")

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, in_channels=3)
        self.config = config
        bottom = config.level_channels[-1]
        self.out = pooling_head(config, features=sum(self.feature_channels) + bottom)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, 3, H, W), t (B,) original timesteps -> fp32 logits (B, num_classes)."""
        return self._leave(*self._enter(x, t))

    def _enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        emb = self.embed(t)
        h, features = self.upper_down(x, emb)
        return h, emb, features

    def _leave(self, h: Tensor, emb: Tensor, features: list[Tensor]) -> Tensor:
        h, lower = self.lower_down(h, emb)
        if self.config.pool.startswith("spatial"):
            h = torch.cat([part.mean(dim=(2, 3)) for part in (*features, *lower, h)], dim=1)
        out: Tensor = self.out(h)
        return full(out)


def join(stages: Sequence[nn.Module], h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
    """The output (B, C, H, W) of upward stages, each of which takes the last skip that is left."""
    for stage, skip in zip(stages, reversed(skips), strict=True):
        h = stage(_Joined.apply(h, skip), emb)
    return h


class _Joined(torch.autograd.Function):
    """Two maps as one of the channels of both.

    A compiled part of the network would hand over the gradients of torch's own function as views
    of one tensor, and autograd copy them for the next part.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, skip: Tensor) -> Tensor:
        """h (B, C, H, W), skip (B, D, H, W) -> (B, C + D, H, W)."""
        ctx.channels = h.shape[1]
        return torch.cat((h, skip), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both maps."""
        h, skip = gradient[:, : ctx.channels], gradient[:, ctx.channels :]
        if torch.compiler.is_compiling():
            h, skip = (part.clone(memory_format=torch.channels_last) for part in (h, skip))
        return h, skip


def build(config: NetworkConfig) -> UNet | Classifier:
    """The network of a configuration."""
    net = UNet(config) if isinstance(config, UNetConfig) else Classifier(config)
    fixed = [name for name, _ in net.named_buffers()]
    fixed += [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    kept = "checkpoints keep what is learned alone: learn it, or compute it in forward"
    assert not fixed, f"{fixed[0]} is a buffer or frozen, and {kept}"
    return net


def example_inputs(config: NetworkConfig, *, images: int) -> dict[str, Tensor]:
    """Uninitialized inputs of the network for so many images, on the default device."""
    size = config.image_size
    inputs = {"x": torch.empty(images, 3, size, size), "t": torch.empty(images)}
    if isinstance(config, ClassifierConfig):
        return inputs
    if config.num_classes is not None:
        inputs["y"] = torch.empty(images, dtype=torch.int64)
    if config.small_size is not None:
        inputs["low_res"] = torch.empty(images, 3, config.small_size, config.small_size)
    return inputs


def output_stages(config: UNetConfig, *, skips: list[int]) -> list[Stage]:
    """The upward stages; each takes the last feature map of `skips` that is left."""
    skips, stages = list(skips), []
    width = config.level_channels[-1]
    levels = list(zip(config.level_channels, config.resolutions, strict=True))
    for level, (out_channels, resolution) in reversed(list(enumerate(levels))):
        for block in range(config.blocks + 1):
            stage = Stage([residual(config, width + skips.pop(), out_channels=out_channels)])
            width = out_channels
            if resolution in config.attention:
                stage.append(attention(config, width, resolution=resolution, heads=config.heads_up))
            if level > 0 and block == config.blocks:
                stage.append(resampler(config, width, direction="up"))
            stages.append(stage)
    return stages


def pooling_head(config: ClassifierConfig, *, features: int) -> nn.Sequential:
    """From the bottom's map, or for "spatial" from the means of all `features`, to logits."""
    width, classes = config.level_channels[-1], config.num_classes
    if config.pool == "attention":
        size, heads = config.resolutions[-1], config.heads_at(width)
        pool = AttentionPool(width, size=size, heads=heads, classes=classes)
        return nn.Sequential(GroupNorm(width), nn.SiLU(), pool)
    if config.pool == "adaptive":
        mean, conv = nn.AdaptiveAvgPool2d(1), zeroed(nn.Conv2d(width, classes, 1))
        return nn.Sequential(GroupNorm(width), nn.SiLU(), mean, conv, nn.Flatten())
    first, last = nn.Linear(features, _SPATIAL_WIDTH), nn.Linear(_SPATIAL_WIDTH, classes)
    if config.pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, GroupNorm(_SPATIAL_WIDTH), nn.SiLU(), last)
