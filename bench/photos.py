"""A substitute for ImageNet: varied JPEGs cut from scikit-learn's two photos.

    python -m bench.photos OUT [--images 3000] [--classes 1000] [--longest 500]

Crops, scales and rotations of real photographs, in ImageNet's layout and naming (a directory for
each WordNet number, `.JPEG` files), with its oddities: grey and CMYK files, odd aspect ratios.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def make_photos(root: Path, *, images: int, classes: int, longest: int = 500) -> None:
    """Write ROOT/nXXXXXXXX/nXXXXXXXX_N.JPEG; image i depends on i alone.

    `longest` bounds the sides in pixels; ImageNet's are typically 500.
    """
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(images):
        name = f"n{1440764 + 1009 * (i % classes):08d}"
        path = root / name / f"{name}_{i // classes}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        view = _view(photos[i % len(photos)], rng, longest)
        mode = {0: "L", 1: "CMYK"}.get(i % 100, "RGB")
        view.convert(mode).save(path, format="JPEG", quality=int(rng.integers(75, 96)))


def _view(photo: Image.Image, rng: np.random.Generator, longest: int) -> Image.Image:
    """A turned and scaled piece of a photograph."""
    size = [int(side) for side in rng.integers(longest // 2, longest, 2)]
    scale = rng.uniform(0.3, 1.2) * min(photo.size) / max(size)
    angle = np.deg2rad(rng.uniform(-30, 30))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    # The middle of the view lies where, at this angle and scale, most of it is inside the photo.
    middle = [rng.uniform(0.35, 0.65) * side for side in photo.size]
    x = middle[0] - cos * size[0] / 2 - sin * size[1] / 2
    y = middle[1] + sin * size[0] / 2 - cos * size[1] / 2
    return photo.transform(
        (size[0], size[1]),
        Image.Transform.AFFINE,
        (cos, sin, x, -sin, cos, y),
        Image.Resampling.BICUBIC,
    )


def main() -> int:
    """Run `python -m bench.photos`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.photos", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write the images to")
    parser.add_argument(
        "--images", type=int, default=3000, help="images to make (default: %(default)s)"
    )
    parser.add_argument(
        "--classes", type=int, default=1000, help="class directories (default: %(default)s)"
    )
    parser.add_argument(
        "--longest", type=int, default=500, help="bound of a side in pixels (default: %(default)s)"
    )
    options = parser.parse_args()
    make_photos(
        options.out, images=options.images, classes=options.classes, longest=options.longest
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
