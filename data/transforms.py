"""From stored bytes to pixels: decoding, ADM's crops, flips.

Everything here is exact and deterministic: decoding takes no fast-and-different path, the centre
crop equals the reference's bit for bit, and random draws are keyed by (seed, image number).
"""

import io
import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data.order import Ints, uniform

Pixels = NDArray[np.uint8]

# What Pillow and simplejpeg raise for damaged input; anything else is our own bug.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

_CROP_DRAWS = 0x43524F50
_FLIP_DRAWS = 0x464C4950


def decode(blob: bytes | memoryview, *, buffer: Pixels | None = None) -> Pixels:
    """Decode an image file to uint8 (H, W, 3), strictly first, then as far as Pillow will go.

    `buffer` may take the pixels, if there is room: fresh pages cost a third of the decoding.

    Raises:
        one of `UNDECODABLE` where even Pillow gives up.
    """
    if blob[:3] == b"\xff\xd8\xff":
        try:
            if simplejpeg.decode_jpeg_header(blob)[2] not in ("CMYK", "YCCK"):  # rounded otherwise
                return simplejpeg.decode_jpeg(blob, colorspace="RGB", strict=True, buffer=buffer)
        except ValueError:
            pass  # Perhaps recoverable damage: Pillow's verdict counts.
    return np.asarray(open_rgb(blob))


def open_rgb(blob: bytes | memoryview) -> Image.Image:
    """Decode an image file with Pillow to an RGB image."""
    with Image.open(io.BytesIO(blob)) as image:
        return image.convert("RGB")


def halve_and_scale(image: Image.Image, *, side: int) -> Image.Image:
    """Bring the smaller side to `side`: BOX halvings while at least twice that, then BICUBIC."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, *, size: int) -> Pixels:
    """The square centre crop on which ADM trains: uint8 (size, size, 3)."""
    pixels = np.asarray(halve_and_scale(image, side=size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, *, size: int, seed: int, number: int) -> Pixels:
    """ADM's crop for classifiers: 80 to 100 % of the smaller side, at any place.

    Drawn by (seed, image number), so that a restart on other ranks sees the same crop.
    """
    smallest, largest = size, math.ceil(size / 0.8)
    draws = uniform(_CROP_DRAWS, seed, number, np.arange(3))
    side = smallest + int(draws[0] * (largest - smallest + 1))
    pixels = np.asarray(halve_and_scale(image, side=side))
    top = int(draws[1] * (pixels.shape[0] - size + 1))
    left = int(draws[2] * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def flips(*, seed: int, numbers: Ints) -> NDArray[np.bool_]:
    """Which images are mirrored: fair coins keyed by (seed, image number)."""
    return uniform(_FLIP_DRAWS, seed, numbers) < 0.5


def to_chw(pixels: Pixels, *, flip: bool, out: Pixels) -> None:
    """Write (H, W, 3) pixels, mirrored if asked, into `out` (3, H, W).

    Raises:
        ValueError: the image has another size.
    """
    if pixels.shape != (out.shape[1], out.shape[2], 3):
        raise ValueError(
            f"image of {pixels.shape[1]} x {pixels.shape[0]} pixels, not {out.shape[1:]}"
        )
    out[:] = (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)
