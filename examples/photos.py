"""Photographs in class folders, for `make photos`: pieces of the two that scikit-learn ships.

    python examples/photos.py OUT [--images 300]

Each piece is cut at its own place, scale and angle around what its class shows, and written as
OUT/CLASS/CLASS_N.jpg. The sizes differ, as those of photographs do.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

# The most degrees that a piece is turned.
TURN = 8
MARGIN = 100


class Subject(NamedTuple):
    """Where a class is in a photograph: ranges of the middle and of the shorter side, in pixels."""

    photo: str
    x: tuple[int, int]
    y: tuple[int, int]
    side: tuple[int, int]


SUBJECTS = {
    "flower": Subject("flower.jpg", (270, 345), (200, 245), (270, 340)),
    "lake": Subject("china.jpg", (400, 500), (205, 245), (110, 170)),
    "petals": Subject("flower.jpg", (260, 355), (170, 270), (70, 110)),
    "roof": Subject("china.jpg", (150, 265), (80, 112), (90, 130)),
    "temple": Subject("china.jpg", (190, 235), (195, 235), (310, 380)),
    "tree": Subject("china.jpg", (545, 600), (190, 270), (120, 170)),
}


def write_photos(root: Path, *, images: int) -> None:
    """Write `images` pieces of each class below `root`; piece i depends on its class and i alone.

    Finished files stay as they are.
    """
    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    photos = {name: _mirrored(photo) for name, photo in zip(names, found.images, strict=True)}
    for label, (name, subject) in enumerate(SUBJECTS.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            path = root / name / f"{name}_{i:03d}.jpg"
            if not path.exists():
                rng = np.random.default_rng((label, i))
                part = path.with_suffix(".part")
                _piece(photos[subject.photo], subject, rng).save(part, format="jpeg", quality=95)
                part.replace(path)


def _mirrored(photo: NDArray[np.uint8]) -> Image.Image:
    """A photograph with mirrored margins, so that a turned piece has no black corner."""
    return Image.fromarray(np.pad(photo, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), "reflect"))


def _piece(photo: Image.Image, subject: Subject, rng: np.random.Generator) -> Image.Image:
    """A turned piece of a photograph, with sides in any ratio up to 1.2."""
    side = rng.uniform(*subject.side)
    size = np.round(side * rng.permutation((1.0, rng.uniform(1.0, 1.2)))).astype(int)
    angle = np.deg2rad(rng.uniform(-TURN, TURN))
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    middle = np.array((rng.uniform(*subject.x), rng.uniform(*subject.y)))
    turn = np.array(((cos, sin), (-sin, cos)))
    x, y = (float(value) for value in middle + MARGIN - turn @ (size / 2))
    transform = (cos, sin, x, -sin, cos, y)
    width, height = (int(each) for each in size)
    return photo.transform(
        (width, height), Image.Transform.AFFINE, transform, Image.Resampling.BICUBIC
    )


def main() -> int:
    """Run `python examples/photos.py`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python examples/photos.py", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write the classes to")
    parser.add_argument(
        "--images", type=int, default=300, help="images of each class (default: %(default)s)"
    )
    options = parser.parse_args()
    write_photos(options.out, images=options.images)
    print(f"{len(SUBJECTS)} classes of {options.images} photographs: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
