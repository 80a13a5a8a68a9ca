"""GroupNorm, what is added before it, its conditioning and its activation: one operation on a GPU.

A map passes through memory twice forward (its moments, its result) and twice backward, and only
the map itself and two numbers per group are kept in between. The operations are
`torch.ops.adm.norm` and its backward.

Only `norm.use_kernels` imports this module, since Triton is not everywhere.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.adm import kernels

# Elements that a program holds at once, and its warps: the fastest of some on an H200 (see
# `bench/RESULTS.md`). No kernel spills a register there.
ELEMENTS, WARPS = 2048, 4
# Channels of a program that takes one tile, and of one that sums many.
_BLOCK, _SUM_BLOCK = 256, 64
# Rows that a program sums, unless a map had more parts then than one program can add up.
_ROWS, _PARTS = 256, 256

LAYOUT = torch.channels_last

# The compiler looks into the operations and calls the kernels itself, which takes the host less
# time than Triton and torch's dispatcher do. It cannot look into kernels that are interpreted.
_operation: Any = torch.library.triton_op
_launched: Any = torch.library.wrap_triton
if not isinstance(kernels.apply, triton.JITFunction):
    _operation, _launched = torch.library.custom_op, lambda kernel: kernel


@dataclass(frozen=True)
class Cut:
    """How maps (B, C, L) are cut into programs; a function of their shape alone."""

    images: int
    channels: int
    length: int
    groups: int

    def tile(self, channels: int) -> dict[str, int]:
        """A tile: channels that divide them all, at most so many, and rows to fill it."""
        BC = min(channels, self.channels & -self.channels)
        BL = min(ELEMENTS // BC, triton.next_power_of_2(self.length))
        return {"C": self.channels, "BL": BL, "BC": BC}

    @cached_property
    def block(self) -> dict[str, int]:
        """The tile of a program that takes one."""
        return self.tile(_BLOCK)

    @cached_property
    def sums(self) -> dict[str, int]:
        """The tile of a program that sums the rows of a part, tile by tile."""
        return self.tile(_SUM_BLOCK)

    @cached_property
    def rows(self) -> int:
        """Rows of a part: whole tiles."""
        BL = self.sums["BL"]
        return int(BL * triton.cdiv(max(_ROWS, triton.cdiv(self.length, _PARTS)), BL))

    @cached_property
    def parts(self) -> int:
        """Parts of a map."""
        return int(triton.cdiv(self.length, self.rows))

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @cached_property
    def group(self) -> dict[str, int]:
        """The sizes with which one program joins all parts of a group."""
        BP, BD = triton.next_power_of_2(self.parts), triton.next_power_of_2(self.width)
        return {"C": self.channels, "D": self.width, "BP": BP, "BD": BD}

    @cached_property
    def by_part(self) -> tuple[int, int, int]:
        """The programs that take a part's rows each."""
        return (self.images, self.parts, self.channels // self.sums["BC"])

    @cached_property
    def by_tile(self) -> tuple[int, int, int]:
        """The programs that take a tile's rows each; CUDA has room for many on the first axis."""
        tiles = int(triton.cdiv(self.length, self.block["BL"]))
        return (tiles, self.images, self.channels // self.block["BC"])


# The host calls this for every norm of every micro-batch.
_cut_of = cache(Cut)


def _cut(x: Tensor, groups: int) -> Cut:
    return _cut_of(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups)


def _precision(x: Tensor) -> tuple[torch.dtype, Any]:
    """In which sums are made."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


@_operation("adm::norm", mutates_args=())
def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm.GroupNorm.forward`; also the groups' mean and 1 / deviation, (B, groups) each."""
    x, film = x.contiguous(memory_format=LAYOUT), _rows(film)
    cut, (full, F) = _cut(x, groups), _precision(x)
    L, B, C = cut.length, cut.images, cut.channels
    means, squares = (x.new_empty((B, cut.parts, C), dtype=full) for _ in range(2))
    mean, rstd = (x.new_empty((B, groups), dtype=full) for _ in range(2))
    _launched(kernels.channel_moments)[cut.by_part](
        x, means, squares, L, cut.rows, **cut.sums, F=F, num_warps=WARPS
    )
    given = {"SHIFT": shift is not None, "F": F, "num_warps": WARPS}
    film_or, shift_or = (weight if value is None else value for value in (film, shift))
    _launched(kernels.group_moments)[(B, groups)](
        means, squares, shift_or, mean, rstd, L, cut.rows, cut.parts, eps, **cut.group, **given
    )
    y = _empty_rows(x)
    _launched(kernels.apply)[cut.by_tile](
        x, y, mean, rstd, weight, bias, film_or, shift_or, L, D=cut.width, **cut.block,
        FILM=film is not None, SILU=silu, **given,
    )  # fmt: skip
    return y.movedim(-1, 1), mean, rstd


@norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], groups), dtype=_precision(x)[0])
    return torch.empty_like(x, memory_format=LAYOUT), mean, torch.empty_like(mean)


@_operation("adm::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm`'s x, of weight, bias and shift by image, and of film (empty without)."""
    x, dy = (v.contiguous(memory_format=LAYOUT) for v in (x, dy))
    cut, (full, F) = _cut(x, mean.shape[1]), _precision(x)
    film, count = _rows(film), 2 if shift is None else 3
    L, B, C = cut.length, cut.images, cut.channels
    film_or, shift_or = (weight if value is None else value for value in (film, shift))
    given = {
        "FILM": film is not None, "SHIFT": shift is not None, "F": F, "num_warps": WARPS,
    }  # fmt: skip
    sums = x.new_empty((B, cut.parts, count, C), dtype=full)
    means = x.new_empty((B, cut.groups, 2), dtype=full)
    parameters = x.new_empty((B, count, C), dtype=full)
    dfilm = x.new_empty((B, 2 * C) if film is not None else 0)
    _launched(kernels.channel_gradients)[cut.by_part](
        x, dy, mean, rstd, weight, bias, film_or, shift_or, sums, L, cut.rows, D=cut.width,
        **cut.sums, SILU=silu, **given,
    )  # fmt: skip
    _launched(kernels.group_gradients)[(B, cut.groups)](
        sums, means, rstd, weight, bias, film_or, dfilm, parameters, L, cut.parts, **cut.group,
        **given,
    )  # fmt: skip
    dx = _empty_rows(x)
    _launched(kernels.apply_gradient)[cut.by_tile](
        x, dy, dx, mean, rstd, means, weight, bias, film_or, shift_or, L, D=cut.width, **cut.block,
        SILU=silu, **given,
    )  # fmt: skip
    return dx.movedim(-1, 1), parameters, dfilm


@norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=LAYOUT)
    count = 2 if shift is None else 3
    parameters = x.new_empty((x.shape[0], count, x.shape[1]), dtype=_precision(x)[0])
    return dx, parameters, x.new_empty(0 if film is None else tuple(film.shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, film, shift, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias, film, shift)


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, film, shift = ctx.saved_tensors
    dx, parameters, dfilm = norm_backward(dy, x, mean, rstd, weight, bias, film, shift, ctx.silu)
    # Outside of the operation, so that the compiler makes one kernel of it.
    dweight, dbias, *dshift = parameters.sum(0).to(weight.dtype).unbind(0)
    dfilm = None if film is None else dfilm
    return dx, dweight, dbias, dfilm, dshift[0] if dshift else None, None, None, None


norm.register_autograd(_backward, setup_context=_keep)


def _empty_rows(x: Tensor) -> Tensor:
    """Room for a map of that shape, (B, H, W, C)."""
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))


def _rows(film: Tensor | None) -> Tensor | None:
    """The conditioning, its rows one behind the other in memory."""
    return None if film is None else film.contiguous()
