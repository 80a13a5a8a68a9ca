"""GroupNorm with the conditioning and the activation that follow it, as one function of a map.

The plain body is three operations of torch's and the reference; the fused one (`fused`) is one
operation on a GPU. Both compute in fp32 at least, whatever the dtype of the parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adm.config import GROUPS, Kernels


class GroupNorm(nn.GroupNorm):
    """GroupNorm over 32 groups, adaptive (AdaGN) and followed by SiLU where the caller says so."""

    #: How it is computed; `use_kernels` sets it.
    kernels: Kernels = "plain"

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(
        self,
        x: Tensor,
        film: Tensor | None = None,
        *,
        silu: bool = False,
        shift: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, ...) -> the same shape and dtype: GroupNorm(x), or SiLU of it with `silu`.

        With `film` (B, 2 C), the scale s and the shift b of every channel one after the other, it
        is GroupNorm(x) (1 + s) + b (paper, section 3). `shift` (C,) is added to x before.
        """
        if self.kernels == "fused" and x.dim() == 4:
            y, _, _ = torch.ops.adm.norm(
                x, self.weight, self.bias, film, shift, self.num_groups, self.eps, silu
            )
            out: Tensor = y
            return out
        if shift is not None:
            x = x + shift.unflatten(0, (-1, *[1] * (x.dim() - 2)))
        return self._plain(x, film, silu=silu)

    def _plain(self, x: Tensor, film: Tensor | None, *, silu: bool) -> Tensor:
        # torch's own 16-bit kernel rounds mean and deviation to 16 bits between its two passes.
        weight, bias = full(self.weight), full(self.bias)
        h = _centred(full(x), self.num_groups)
        h = F.group_norm(h, self.num_groups, weight, bias, self.eps).to(x.dtype)
        if film is not None:
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return F.silu(h) if silu else h


def use_kernels(net: nn.Module, kernels: Kernels) -> None:
    """Compute the norms of a net so from now on; ImportError where "fused" has no Triton."""
    if kernels == "fused":
        from trainer.adm import fused  # noqa: F401
    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.kernels = kernels


def full(x: Tensor) -> Tensor:
    """x, of any shape, in fp32 or, if it is in that, fp64: for statistics, losses and samplers."""
    return x if x.dtype == torch.float64 else x.float()


def _centred(x: Tensor, groups: int) -> Tensor:
    """x (B, C, ...) less the means of its groups, which changes neither the norm nor its gradient.

    On a CPU torch's kernel for channels last takes the variance as E[x^2] - E[x]^2, of which a mean
    far from zero leaves nothing.
    """
    if x.device.type != "cpu" or x.dim() != 4 or x.is_contiguous():
        return x
    with torch.no_grad():
        means = x.mean(dim=(2, 3)).unflatten(1, (groups, -1))
        means = means.mean(dim=2, keepdim=True).expand_as(means).flatten(1)
    return x - means[:, :, None, None]
