"""Crops of long strips: to enlarge all of one for a square of its middle would take gigabytes.

Pillow enlarges rows and columns in two passes, each output pixel from four or five of the input.
Here only the wanted pixels of the longer direction are computed, in Pillow's own fixed-point
arithmetic, so that the crop equals that of the enlarged image bit for bit.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Pillow's bicubic kernel is that of Keys (1981) with a = -0.5; its weights have 22 bits.
_A = -0.5
_BITS = 22


def enlarged_part(
    image: Image.Image, *, size: tuple[int, int], box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """The box (left, top, right, bottom) of an RGB image that is enlarged to `size` by BICUBIC.

    uint8 (bottom - top, right - left, 3), as cropping after `image.resize` gives.
    """
    left, top, right, bottom = box
    if size[0] > size[1]:
        rows = _window(np.asarray(image).transpose(1, 0, 2), size[0], left, right)
        part = Image.fromarray(np.ascontiguousarray(rows.transpose(1, 0, 2)))
        full = part.resize((part.width, size[1]), Image.Resampling.BICUBIC)
        return np.asarray(full)[top:bottom]
    full = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return _window(np.asarray(full), size[1], top, bottom)[:, left:right]


def _window(pixels: NDArray[np.uint8], size: int, first: int, last: int) -> NDArray[np.uint8]:
    """Rows [first, last) of an image, uint8 (H, W, 3), whose rows are enlarged to `size`."""
    height = len(pixels)
    scale = height / size
    rows = []
    for center in (np.arange(first, last) + 0.5) * scale:
        low, high = max(int(center - 1.5), 0), min(int(center + 2.5), height)
        weights = _kernel(np.arange(low, high) - center + 0.5)
        fixed = np.trunc(weights / weights.sum() * (1 << _BITS) + np.copysign(0.5, weights))
        total = np.tensordot(fixed.astype(np.int64), pixels[low:high].astype(np.int64), axes=1)
        rows.append((total + (1 << (_BITS - 1))) >> _BITS)
    return np.clip(np.stack(rows), 0, 255).astype(np.uint8)


def _kernel(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
