"""From stored bytes to pixels: decoding, ADM's crops, flips.

Everything here is exact and deterministic: decoding uses no fast approximation, the centre crop
equals the reference's bit for bit, and random draws are keyed by (seed, image index).
"""

import io
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from data.enlarge import enlarged_part
from data.order import Ints, uniform

Pixels = NDArray[np.uint8]

# Pillow refuses a PNG with a text of more than 1 MiB, such as a program's workflow. Here, a text
# may be as large as Pillow allows all texts of an image together (64 MiB).
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What Pillow and simplejpeg raise for damaged input; anything else is our own bug.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

# The transposition that makes an image with each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Only the crop is computed where the whole scaled image has more pixels than this.
_LARGE = 1 << 26

# Grey images of 16 bits whose values are all smaller are from a device of 12 bits.
_DIM = 1 << 12

_CROP_DRAWS = 0x43524F50
_FLIP_DRAWS = 0x464C4950


def decode(
    content: bytes | memoryview,
    *,
    colours: Literal["RGB", "BGR"] = "RGB",
    buffer: Pixels | None = None,
) -> Pixels:
    """Decode an image file to uint8 (H, W, 3): strictly, or what Pillow can recover.

    Pixels of a JPEG lie in `buffer`, uint8 (n,), if it is large enough: allocating memory takes a
    third of the time of decoding.

    Raises:
        one of `UNDECODABLE` where Pillow fails, too.
    """
    if content[:3] == b"\xff\xd8\xff":
        try:
            # CMYK is left to Pillow: simplejpeg rounds it differently.
            if simplejpeg.decode_jpeg_header(content)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(
                    content, colorspace=colours, strict=True, buffer=buffer
                )
        except ValueError:
            pass  # it is damaged, perhaps so that Pillow recovers
    pixels = np.asarray(open_over(content).image)
    return pixels if colours == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def decode_into(
    content: bytes | memoryview, *, mirrored: bool, out: Pixels, scratch: Pixels
) -> None:
    """Decode an image of the size of `out`, uint8 (H, W, 3), into it, mirrored if asked.

    It is decoded to `scratch`, uint8 (n,), which stays in the CPU's cache, and copied from there.

    Raises:
        ValueError: it has another size; or one of `UNDECODABLE`.
    """
    pixels = decode(content, colours="BGR" if mirrored else "RGB", buffer=scratch)
    if not mirrored:
        write(pixels, out=out)
        return
    _check_size(pixels, out)
    # Reversing the bytes of a row mirrors it and turns BGR into RGB. Eight bytes at a time, that is
    # as fast as copying; pixel by pixel, it would take a fifth of the time of decoding.
    row = 3 * out.shape[1]
    theirs, ours = (">u8", "<u8") if row % 8 == 0 else ("u1", "u1")
    out.reshape(-1, row).view(ours)[:] = pixels.reshape(-1, row).view(theirs)[:, ::-1]


class Opened(NamedTuple):
    """An image file as an RGB image, and what is known of the file."""

    image: Image.Image
    #: Whether it is transparent somewhere, so that a background shows through.
    is_transparent: bool = False
    #: Whether it has 16 bits and uses at most 12 of them, so that it is nearly black in 8 bits.
    is_dim: bool = False
    #: What makes it upright by its EXIF orientation; None if it is upright or has none.
    turn: Image.Transpose | None = None


def open_over(content: bytes | memoryview, background: str = "white") -> Opened:
    """Decode an image file with Pillow; `background` shows through where it is transparent.

    Raises:
        one of `UNDECODABLE`.
    """
    with _opened(content) as image:
        turn = _turn(image)
        if image.mode == "F":
            raise ValueError("its values are floating-point numbers: convert it to 8 or 16 bits")
        if image.mode.startswith("I"):
            pixels, most = _from_16_bits(image)
            key = image.info.get("transparency")
            clear = Image.fromarray(np.asarray(image) == (key if isinstance(key, int) else -1))
            pixels.paste(background, mask=clear)
            is_transparent = clear.getbbox() is not None
            return Opened(pixels, is_transparent, is_dim=0 < most < _DIM, turn=turn)
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            if layers.getchannel("A").getextrema() != (255, 255):
                behind = Image.new("RGBA", image.size, background)
                flat = Image.alpha_composite(behind, layers).convert("RGB")
                return Opened(flat, is_transparent=True, turn=turn)
        # `convert` would copy an RGB image, too.
        return Opened(image if image.mode == "RGB" else image.convert("RGB"), turn=turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises errors of any type: treat it as absent
        return None


def _opened(content: bytes | memoryview) -> Image.Image:
    """An image, decoded by Pillow; any error is raised as one of `UNDECODABLE`."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError:  # its text names an object in memory
        what = "no image that Pillow knows" if len(content) else "an empty file"
        raise UnidentifiedImageError(what) from None
    except (*UNDECODABLE, MemoryError):
        raise
    except Exception as error:  # decoders meet damage with errors of any type
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return image


def _from_16_bits(grey: Image.Image) -> tuple[Image.Image, int]:
    """An RGB image from a grey one of 16 bits, and its largest value; Pillow would clip at 255."""
    values = np.asarray(grey)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        raise ValueError(f"its grey values are from {least} to {most}: must be from 0 to 65535")
    scaled = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB"), most


def halve_and_scale(image: Image.Image, *, side: int) -> Image.Image:
    """Scale the smaller side to `side`: halved by BOX while twice that or more, then BICUBIC."""
    image, size = _halved(image, side)
    return image.resize(size, Image.Resampling.BICUBIC)


def _halved(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The image after the halvings, and the size to which it is scaled then."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def _scaled_part(
    image: Image.Image,
    *,
    side: int,
    size: int,
    top_at: Callable[[int], int],
    left_at: Callable[[int], int],
) -> Pixels:
    """A square of `halve_and_scale`, uint8 (size, size, 3).

    `top_at` and `left_at` give its place from the pixels that the image has more than `size`.
    """
    image, (width, height) = _halved(image, side)
    top, left = top_at(height - size), left_at(width - size)
    if width * height > _LARGE and min(image.size) < side:
        box = (left, top, left + size, top + size)
        return enlarged_part(image, size=(width, height), box=box)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return pixels[top : top + size, left : left + size]


def center_crop(image: Image.Image, *, size: int) -> Pixels:
    """The square centre crop on which ADM trains: uint8 (size, size, 3)."""
    return _scaled_part(image, side=size, size=size, top_at=_middle, left_at=_middle)


def _middle(room: int) -> int:
    return room // 2


def random_crop(image: Image.Image, *, size: int, seed: int, index: int) -> Pixels:
    """ADM's crop for classifiers: 80 to 100 % of the smaller side, at any place.

    uint8 (size, size, 3), drawn by (seed, image index): a restart on other ranks sees the same.
    """
    smallest, largest = size, math.ceil(size / 0.8)
    draws = uniform(_CROP_DRAWS, seed, index, np.arange(3))
    side = smallest + int(draws[0] * (largest - smallest + 1))
    return _scaled_part(
        image,
        side=side,
        size=size,
        top_at=lambda room: int(draws[1] * (room + 1)),
        left_at=lambda room: int(draws[2] * (room + 1)),
    )


def flips(*, seed: int, indices: Ints) -> NDArray[np.bool_]:
    """Which images (n,) are mirrored: bool (n,), fair and keyed by (seed, image index)."""
    return uniform(_FLIP_DRAWS, seed, indices) < 0.5


def png(pixels: Pixels, *, compress_level: int = -1) -> bytes:
    """An image, uint8 (H, W, 3), as a file of exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def write(pixels: Pixels, *, out: Pixels) -> None:
    """Write pixels into `out`, both uint8 (H, W, 3); ValueError where the sizes differ."""
    _check_size(pixels, out)
    out[:] = pixels


def _check_size(pixels: Pixels, out: Pixels) -> None:
    if pixels.shape != out.shape:
        raise ValueError(
            f"image of {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"not {out.shape[1]} x {out.shape[0]}"
        )
