"""Contact sheets: thumbnails of a dataset in one picture."""

import math
from collections.abc import Iterable

from PIL import Image

from data.transforms import decode

# Pixels of a thumbnail's longer side.
TILE = 128


def contact_sheet(stored: Iterable[bytes], *, tile: int = TILE) -> Image.Image:
    """Draw image files as thumbnails of at most `tile` pixels, in rows of a square sheet.

    Raises:
        one of `data.transforms.UNDECODABLE`.
    """
    thumbnails = []
    for content in stored:
        image = Image.fromarray(decode(content))
        scale = tile / max(image.size)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        # Small images are shown pixel by pixel, large ones smoothly.
        filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        thumbnails.append(image.resize(size, filter_))
    columns = math.ceil(math.sqrt(len(thumbnails)))
    rows = math.ceil(len(thumbnails) / max(columns, 1))
    sheet = Image.new("RGB", (max(columns, 1) * tile, max(rows, 1) * tile))
    for i, thumbnail in enumerate(thumbnails):
        sheet.paste(thumbnail, (i % columns * tile, i // columns * tile))
    return sheet
