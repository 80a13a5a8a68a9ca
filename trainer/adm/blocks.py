"""The parts of the nets: a feature map goes in, the next stage's comes out.

Paper, section 3 and appendix A: residual blocks that take the timestep (and class) embedding in
one of three ways, self-attention over a whole map or inside windows, and resampling. Attribute
names are those of the published checkpoints, so that their state dicts load as they are.

Parameters may be bf16, fp16, fp32 or fp64. Statistics (GroupNorm) and softmax are in fp32 at least.
"""

import math
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute

from trainer.adm.config import Conditioning, QkvOrder
from trainer.adm.norm import GroupNorm

Resampling = Literal["same", "up", "down"]
ConvT = TypeVar("ConvT", nn.Conv1d, nn.Conv2d)

_HALF_SQRT = 1 / math.sqrt(2)
# Without cuDNN's attention, whose backward pass may return NaN where positions do not fill its
# tiles (pytorch#196678); it is no faster there.
_TILE = 128
_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def timestep_embedding(t: Tensor, *, width: int) -> Tensor:
    """Sinusoids of the timestep, fp32: t (B,) -> (B, width), cosines first, periods to 1e4."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class ResidualBlock(nn.Module):
    """x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W').

    `conditioning` is how the embedding enters (Table 3): "adagn", GroupNorm(h)(1 + s) + b; "add",
    GroupNorm(h + e); "concat", e as further channels, constant over the map, into the second
    convolution. `resample` resizes by two inside the block (BigGAN); `rescale` divides the sum by
    the square root of two (Table 1). `checkpoint` recomputes activations in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int,
        emb_channels: int,
        conditioning: Conditioning,
        dropout: float,
        rescale: bool,
        resample: Resampling,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        self.conditioning, self.resample = conditioning, resample
        self.rescale, self.checkpoint = rescale, checkpoint
        emb_out = 2 * out_channels if conditioning == "adagn" else out_channels
        joined = 2 * out_channels if conditioning == "concat" else out_channels
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(joined, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""
        if self.checkpoint and torch.is_grad_enabled():
            out: Tensor = recompute(self._block, x, emb, use_reentrant=False)
            return out
        return self._block(x, emb)

    def _block(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, conv = self.in_layers[0], self.in_layers[2]
        assert isinstance(conv, nn.Conv2d)
        h, shift = resize(norm(x, silu=True), self.resample), None
        if torch.compiler.is_compiling() and self.conditioning != "add":
            # The norm that follows adds the bias: a map is read and written once less. (ZeRO-3,
            # which gathers the weights of one module at a time, is not compiled.)
            h, shift = F.conv2d(h, conv.weight, padding=1), conv.bias
        else:
            h = conv(h)
        h = self._condition(h, self.emb_layers(emb), shift)
        return residual_sum(self.skip_connection(resize(x, self.resample)), h, self.rescale)

    def _condition(self, h: Tensor, emb: Tensor, shift: Tensor | None) -> Tensor:
        norm, _, dropout, conv = self.out_layers
        if self.conditioning == "adagn":
            h = dropout(norm(h, emb, silu=True, shift=shift))
        elif self.conditioning == "add":
            h = dropout(norm(h + emb[:, :, None, None], silu=True))
        else:
            h = dropout(norm(h, silu=True, shift=shift))
            h = torch.cat((h, emb[:, :, None, None].expand_as(h)), dim=1)
        out: Tensor = conv(h)
        return out


class Pointwise(nn.Conv1d):
    """A convolution of one position, which is a linear map of tokens (..., channels)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., channels) -> (..., out_channels)."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the positions of a map: (B, channels, H, W) -> same shape.

    With `window`, a position sees only its own window x window square (local attention).
    `order` is how q, k and v lie in the projection: "legacy" per head, "new" q, k, v outermost.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        order: QkvOrder,
        window: int | None,
        rescale: bool,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        self.heads, self.order, self.window = heads, order, window
        self.rescale, self.checkpoint = rescale, checkpoint
        self.norm = GroupNorm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> the same shape."""
        if self.checkpoint and torch.is_grad_enabled():
            out: Tensor = recompute(self._block, x, use_reentrant=False)
            return out
        return self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        size = self.window or x.shape[2]
        tokens = split_windows(self.norm(x), size=size)
        h = self.proj_out(attend(self.qkv(tokens), heads=self.heads, order=self.order))
        return residual_sum(x, merge_windows(h, size=size, shape=x.shape), self.rescale)


class AttentionPool(nn.Module):
    """A map (B, channels, S, S) -> logits (B, classes): its mean attends to all positions.

    The classifier's head in the paper (section 4), as in CLIP; q, k, v in the "new" order.
    """

    def __init__(self, channels: int, *, size: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        positions = torch.randn(channels, size * size + 1) / math.sqrt(channels)
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = Pointwise(channels, 3 * channels)
        self.c_proj = Pointwise(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, S, S) -> logits (B, classes)."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens.mean(dim=1, keepdim=True), tokens), dim=1)
        qkv = self.qkv_proj(tokens + self.positional_embedding.T)
        pooled = attend(qkv, heads=self.heads, order="new")[:, 0]
        logits: Tensor = self.c_proj(pooled)
        return logits


class Downsample(nn.Module):
    """Halves a map: a strided convolution ("conv"), else 2 x 2 means."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> (B, channels, H / 2, W / 2)."""
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Doubles a map by nearest neighbours, with a convolution after it if `conv`."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> (B, channels, 2 H, 2 W)."""
        out: Tensor = self.conv(resize(x, "up"))
        return out


class Stage(nn.ModuleList):
    """Blocks run one after another; residual blocks also take the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, emb_channels) -> (B, C', H', W')."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def attend(qkv: Tensor, *, heads: int, order: QkvOrder) -> Tensor:
    """Scaled dot-product attention: qkv (B, positions, 3C) -> (B, positions, C).

    Nothing is copied: q, k and v are views whose last dimension is contiguous, as the fused kernels
    need. In 16 bits those keep the products q k and the softmax in fp32.
    """
    if order == "legacy":
        parts = qkv.unflatten(2, (heads, 3, -1)).unbind(3)
    else:
        parts = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    with sdpa_kernel(_ANY_LENGTH) if qkv.shape[1] % _TILE else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def split_windows(x: Tensor, *, size: int) -> Tensor:
    """(B, C, H, W) -> (B * windows, size * size, C), windows in row order."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def merge_windows(windows: Tensor, *, size: int, shape: torch.Size) -> Tensor:
    """The inverse of `split_windows`: back to `shape` = (B, C, H, W), in channels last."""
    rows, columns = shape[2] // size, shape[3] // size
    x = windows.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def resize(x: Tensor, resample: Resampling) -> Tensor:
    """Resize x (B, C, H, W): halve by 2 x 2 means, double by nearest neighbours, or leave it."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    if resample == "up":
        doubled: Tensor = _Doubled.apply(x)
        return doubled
    return x


class _Doubled(torch.autograd.Function):
    """A map of twice the size by nearest neighbours.

    The backward pass of torch's own function, once compiled, is atomic additions into a map that is
    not channels last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return F.interpolate(x, scale_factor=2, mode="nearest")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum of the four positions that a value went to."""
        return F.avg_pool2d(gradient, 2, divisor_override=1)


def residual_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, both (B, C, H, W); `rescale` divides by sqrt(2), so that the variance stays."""
    return (x + h) * _HALF_SQRT if rescale else x + h


def zeroed(conv: ConvT) -> ConvT:
    """The convolution with zero weights: its block starts as the identity."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
