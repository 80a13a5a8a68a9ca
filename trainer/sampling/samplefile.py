"""Reading drawn images: an `.npz` in the ADM evaluator's layout, or a directory of shards.

Images are read by their position, so that neither a file nor a dataset need fit in memory.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import files, npz
from data.config import FetchConfig
from data.dataset import Shards, open_shards
from data.order import packed_place
from data.stored_images import BadSampleError, StoredImages
from data.transforms import UNDECODABLE, center_crop, decode

# The member of an `.npz`, the key of a manifest's `made_by` and the text of a grid's PNG that hold
# how images were drawn.
RECORD = "request"


class Samples(Protocol):
    """Images that are read by their position: drawn ones, or a packed dataset."""

    path: Path
    count: int
    #: Height and width.
    size: tuple[int, int]
    #: The class of each image, int64 (count,); None where images have no classes.
    labels: NDArray[np.int64] | None
    #: The names of the classes, by number; None where they are not known.
    classes: Sequence[str] | None
    #: How the images were drawn (`SampleRequest`); None if that is not known.
    record: Mapping[str, Any] | None

    def images(self, first: int, last: int) -> NDArray[np.uint8]:
        """The images [first, last), uint8 (n, H, W, 3).

        Raises:
            ValueError: one of them is damaged.
        """
        ...

    def checksum(self) -> str:
        """Identifies the content; reads every byte of a file, the first time.

        Raises:
            ValueError: a file's images are not those that were written.
        """
        ...


def open_samples(path: Path, *, size: int | None = None) -> Samples:
    """Open a sample file, or a directory of shards.

    Packed images that keep their own sizes are cropped to `size`, as in training.

    Raises:
        ValueError: there is nothing of that kind, or it is damaged.
    """
    if path.is_dir():
        return ShardSamples(path, size=size)
    if not path.is_file():
        raise ValueError(f"no such file of samples: {path}")
    return NpzSamples(path)


def picture_record(picture: Path) -> dict[str, Any] | None:
    """The request recorded in a grid's PNG; None for other pictures."""
    try:
        with Image.open(picture) as image:
            found = json.loads(image.info[RECORD])
    except Exception:  # files that are no pictures make it raise errors of many types
        return None
    return found if isinstance(found, dict) else None


class NpzSamples:
    """An `.npz`: uint8 NHWC in `arr_0`, and where there are classes, labels in `arr_1`."""

    def __init__(self, path: Path) -> None:
        self.path, self._checksum = path, ""
        try:
            self._images = npz.mapped(path, "arr_0")
            with np.load(path, allow_pickle=False) as file:
                labels = file.get("arr_1")
                self.record = json.loads(str(file[RECORD])) if RECORD in file else None
        except PermissionError:
            raise
        except KeyError:
            raise ValueError(
                f"{path} has no array arr_0: must be the images, uint8 (N, H, W, 3), and arr_1 "
                "their labels, if any"
            ) from None
        except Exception as error:  # numpy and zipfile raise errors of many types for other files
            raise ValueError(
                f"{path} is not a readable sample file: {error}; an .npz or a directory of packed "
                "images (`python -m data.pack`) is"
            ) from None
        shape, kind = self._images.shape, self._images.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"{path}: images are {kind} {shape} instead of uint8 (N, H, W, 3)")
        self.count, self.size = shape[0], (shape[1], shape[2])
        self.labels = None if labels is None else self._checked(labels)
        self.classes: Sequence[str] | None = None

    def images(self, first: int, last: int) -> NDArray[np.uint8]:
        """As `Samples.images`."""
        return np.array(self._images[first:last])

    def checksum(self) -> str:
        """As `Samples.checksum`: the sha256 of the file."""
        if not self._checksum:
            npz.check(self.path, "arr_0")  # mapped into memory, they are read without a check
            self._checksum = files.sha256(self.path)
        return self._checksum

    def _checked(self, labels: NDArray[Any]) -> NDArray[np.int64] | None:
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: labels are {labels.dtype} {labels.shape} instead of "
                f"integers {(self.count,)}"
            )
        if labels.dtype.kind == "u" and labels.size and labels.max() >= 2**63:
            raise ValueError(f"{self.path}: {labels.max()} is no class")
        # Version 0.1 wrote zeros where there are no classes.
        return labels.astype(np.int64) if self.record or labels.any() else None


class ShardSamples:
    """A packed dataset in its own order, in a local directory."""

    def __init__(self, path: Path, *, size: int | None) -> None:
        self.path = path
        self.shards: Shards = open_shards(path)
        side = self.shards.image_size or size
        if side is None:
            raise ValueError(
                f"{path} holds images that keep their own sizes: pack them without "
                "--keep-original; `trainer.evaluate reference` crops them with --size"
            )
        self._side = side
        self.count, self.size = self.shards.count, (side, side)
        # `astype` copies: a view would keep the index's file open.
        count = len(self.shards.shards)
        labels = [self.shards.index(i)["label"].astype(np.int64) for i in range(count)]
        self.labels = np.concatenate(labels) if self.shards.labelled else None
        self.record = self.shards.made_by.get(RECORD)
        numbers = [str(i) for i in range(len(self.shards.classes))]
        # Where the names were not known, drawn images have numbers in their place.
        is_named = self.shards.labelled and not (self.record and [*self.shards.classes] == numbers)
        self.classes: Sequence[str] | None = self.shards.classes if is_named else None
        self._ends = np.cumsum(self.shards.sizes)
        self._stored = StoredImages(self.shards, config=FetchConfig())

    def images(self, first: int, last: int) -> NDArray[np.uint8]:
        """As `Samples.images`."""
        return np.stack([self._image(i) for i in range(first, min(last, self.count))])

    def checksum(self) -> str:
        """The dataset's fingerprint."""
        return self.shards.fingerprint

    def _image(self, index: int) -> NDArray[np.uint8]:
        shard, row = packed_place(self._ends, index)
        try:
            stored = self._stored.read(int(shard), int(row))
            pixels = decode(stored.content)
        except (BadSampleError, *UNDECODABLE) as error:
            raise ValueError(f"image {index} of {self.path} is damaged: {error}") from None
        if pixels.shape[:2] != self.size:
            pixels = center_crop(Image.fromarray(pixels), size=self._side)
        return pixels
