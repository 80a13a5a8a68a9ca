"""The Triton kernels of `fused`: GroupNorm, its conditioning and its activation on a GPU.

Maps x and y are channels last: (B, C, H, W) lies in memory as (B, L, C) with L = H W. A group has
D channels; BL, BC, BP and BD are sizes of blocks, of rows, channels, parts of a map and channels of
a group; F is the type of all sums, fp32 or fp64. Sums are made in a fixed order, without atomic
operations, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

# Numbers that are 1 somewhere stay variables.
_kernel = triton.jit(do_not_specialize=["L", "ROWS", "parts"])


@triton.jit
def _load(x, image, rows, columns, last, L, C: tl.constexpr, F: tl.constexpr):
    """Rows (BL,) x channels (BC,) of an image, zero from the row `last` on."""
    at = image.to(tl.int64) * L * C + rows[:, None] * C + columns[None, :]
    return tl.load(x + at, mask=(rows < last)[:, None], other=0).to(F)


@triton.jit
def _coefficients(weight, bias, film, image, c, C: tl.constexpr, FILM: tl.constexpr, F: tl.constexpr):  # fmt: skip  # noqa: E501
    """Factor and summand of normalised values: weight and bias, changed by the conditioning."""
    a, o = tl.load(weight + c).to(F), tl.load(bias + c).to(F)
    if FILM:
        scale = 1 + tl.load(film + image * 2 * C + c).to(F)
        a, o = a * scale, o * scale + tl.load(film + image * 2 * C + C + c).to(F)
    return a, o


@triton.jit
def _centre(mean, shift, group, c, SHIFT: tl.constexpr, F: tl.constexpr):
    """What the normalised values are off from: the mean, less what is added to the channel."""
    centre = tl.load(mean + group)
    if SHIFT:
        centre -= tl.load(shift + c).to(F)
    return centre


@_kernel
def channel_moments(
    x, means, squares, L, ROWS, C: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squares around it, of every channel of a part: (B, parts, C) each.

    Every place of a tile keeps both over all tiles by Welford's update, and all places are joined
    at the end: no large mean cancels the variance, and threads wait for each other once.
    """
    image, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, place = tl.program_id(2) * BC + tl.arange(0, BC), tl.arange(0, BL)
    first, last = part * ROWS, tl.minimum(part * ROWS + ROWS, L)
    mean, square = tl.zeros((BL, BC), F), tl.zeros((BL, BC), F)
    for start in range(first, last, BL):
        rows = start + place
        v = _load(x, image, rows, c, last, L, C, F)
        off = tl.where((rows < last)[:, None], v - mean, 0)
        mean += off * (1 / ((start - first) // BL + 1).to(F))
        square += off * (v - mean)
    counts = tl.maximum((last - first - place + BL - 1) // BL, 0).to(F)[:, None]
    whole = tl.sum(mean * counts, 0) / (last - first).to(F)
    off = mean - whole[None, :]
    at = (image * parts + part) * C + c
    tl.store(means + at, whole)
    tl.store(squares + at, tl.sum(square + counts * off * off, 0))


@_kernel
def group_moments(
    means, squares, shift, mean, rstd, L, ROWS, parts, eps: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, SHIFT: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of every group, from those of its channels in all parts."""
    image, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p, d = tl.arange(0, BP)[:, None], tl.arange(0, BD)[None, :]
    inside = (p < parts) & (d < D)
    at = (image * parts + p) * C + group * D + d
    rows = tl.minimum(L - p * ROWS, ROWS).to(F)
    m = tl.load(means + at, mask=inside, other=0)
    if SHIFT:
        m += tl.load(shift + group * D + d, mask=d < D, other=0).to(F)
    total = tl.sum(tl.sum(tl.where(inside, rows * m, 0), 0), 0)
    count = tl.full((), L * D, F)
    whole = total / count
    off = m - whole
    square = tl.load(squares + at, mask=inside, other=0) + rows * off * off
    variance = tl.sum(tl.sum(tl.where(inside, square, 0), 0), 0) / count
    tl.store(mean + image * groups + group, whole)
    tl.store(rstd + image * groups + group, 1 / tl.sqrt(variance + eps))


@_kernel
def apply(
    x, y, mean, rstd, weight, bias, film, shift, L, C: tl.constexpr, D: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr, FILM: tl.constexpr, SHIFT: tl.constexpr,
    SILU: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """y = SiLU(a (x + shift - mean) rstd + o), with a and o of `_coefficients`."""
    rows, image = tl.program_id(0) * BL + tl.arange(0, BL), tl.program_id(1)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    group = image * (C // D) + c // D
    a, o = _coefficients(weight, bias, film, image, c, C, FILM, F)
    a *= tl.load(rstd + group)
    centre = _centre(mean, shift, group, c, SHIFT, F)
    h = (_load(x, image, rows, c, L, L, C, F) - centre[None, :]) * a[None, :]
    h += o[None, :]
    if SILU:
        h = h / (1 + tl.exp(-h))
    at = image.to(tl.int64) * L * C + rows[:, None] * C + c[None, :]
    tl.store(y + at, h.to(y.dtype.element_ty), mask=(rows < L)[:, None])


@triton.jit
def _inner(x, dy, centre, rstd, a, o, SILU: tl.constexpr):
    """The normalised values, and the gradient of a xhat + o."""
    xhat = (x - centre[None, :]) * rstd[None, :]
    if SILU:
        h = xhat * a[None, :] + o[None, :]
        s = 1 / (1 + tl.exp(-h))
        dy = dy * s * (1 + h * (1 - s))
    return xhat, dy


@_kernel
def channel_gradients(
    x, dy, mean, rstd, weight, bias, film, shift, sums, L, ROWS, C: tl.constexpr, D: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr, FILM: tl.constexpr, SHIFT: tl.constexpr,
    SILU: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Sums over a part's rows of the inner gradient dh, of dh xhat, and, with a shift, of xhat.

    They are (B, parts, 2 or 3, C).
    """
    image, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    group = image * (C // D) + c // D
    centre, r = _centre(mean, shift, group, c, SHIFT, F), tl.load(rstd + group)
    a, o = _coefficients(weight, bias, film, image, c, C, FILM, F)
    first, last = part * ROWS, tl.minimum(part * ROWS + ROWS, L)
    total, product = tl.zeros((BL, BC), F), tl.zeros((BL, BC), F)
    values = tl.zeros((BL, BC), F)
    for start in range(first, last, BL):
        rows = start + tl.arange(0, BL)
        v, g = _load(x, image, rows, c, last, L, C, F), _load(dy, image, rows, c, last, L, C, F)
        xhat, dh = _inner(v, g, centre, r, a, o, SILU)
        total += dh
        product += dh * xhat
        if SHIFT:
            values += tl.where((rows < last)[:, None], xhat, 0)
    at = sums + (image * parts + part) * (2 + SHIFT) * C + c
    tl.store(at, tl.sum(total, 0))
    tl.store(at + C, tl.sum(product, 0))
    if SHIFT:
        tl.store(at + 2 * C, tl.sum(values, 0))


@_kernel
def group_gradients(
    sums, means, rstd, weight, bias, film, dfilm, dparameters, L, parts, C: tl.constexpr,
    D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, FILM: tl.constexpr, SHIFT: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Means of a dh and a dh xhat over a group, and every image's gradients of the coefficients.

    Those of weight, bias and, if there is one, shift: (B, 2 or 3, C).
    """
    image, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p, d = tl.arange(0, BP)[:, None], tl.arange(0, BD)
    at = sums + (image * parts + p) * (2 + SHIFT) * C + group * D + d[None, :]
    inside, real = (p < parts) & (d < D)[None, :], d < D
    total = tl.sum(tl.load(at, mask=inside, other=0), 0)
    product = tl.sum(tl.load(at + C, mask=inside, other=0), 0)
    c = tl.minimum(group * D + d, C - 1)
    a, _ = _coefficients(weight, bias, film, image, c, C, FILM, F)
    count = tl.full((), L * D, F)
    k, q = tl.sum(total * a, 0) / count, tl.sum(product * a, 0) / count
    tl.store(means + (image * groups + group) * 2, k)
    tl.store(means + (image * groups + group) * 2 + 1, q)
    into = dparameters + image * (2 + SHIFT) * C + c
    if SHIFT:  # the sum of dx over the rows
        values = tl.sum(tl.load(at + 2 * C, mask=inside, other=0), 0)
        shift = (total * a - L * k - values * q) * tl.load(rstd + image * groups + group)
        tl.store(into + 2 * C, shift, mask=real)
    if FILM:
        w, b = tl.load(weight + c).to(F), tl.load(bias + c).to(F)
        scale = product * w + total * b
        at_film = image * 2 * C + c
        tl.store(dfilm + at_film, scale.to(dfilm.dtype.element_ty), mask=real)
        tl.store(dfilm + at_film + C, total.to(dfilm.dtype.element_ty), mask=real)
        factor = 1 + tl.load(film + at_film).to(F)
        total, product = total * factor, product * factor
    tl.store(into, product, mask=real)
    tl.store(into + C, total, mask=real)


@_kernel
def apply_gradient(
    x, dy, dx, mean, rstd, means, weight, bias, film, shift, L, C: tl.constexpr, D: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr, FILM: tl.constexpr, SHIFT: tl.constexpr,
    SILU: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """dx = rstd (a dh - mean(a dh) - xhat mean(a dh xhat)), the means over a group."""
    rows, image = tl.program_id(0) * BL + tl.arange(0, BL), tl.program_id(1)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    group = image * (C // D) + c // D
    a, o = _coefficients(weight, bias, film, image, c, C, FILM, F)
    v, g = _load(x, image, rows, c, L, L, C, F), _load(dy, image, rows, c, L, L, C, F)
    r = tl.load(rstd + group)
    xhat, dh = _inner(v, g, _centre(mean, shift, group, c, SHIFT, F), r, a, o, SILU)
    k, q = tl.load(means + 2 * group)[None, :], tl.load(means + 2 * group + 1)[None, :]
    d = (dh * a[None, :] - k - xhat * q) * r[None, :]
    at = image.to(tl.int64) * L * C + rows[:, None] * C + c[None, :]
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=(rows < L)[:, None])
