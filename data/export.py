"""From shards back to a sample file: `.npz` with `arr_0` and `arr_1`, for ADM's evaluator."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import files, npz
from data.config import FetchConfig
from data.dataset import Shards, open_shards
from data.progress import Step, with_progress
from data.stored_images import BadSampleError, StoredImage, StoredImages
from data.transforms import UNDECODABLE, decode


def export(root: str, out: Path) -> Shards:
    """Write all images of a dataset, in packing order: uint8 (N, H, W, 3), and labels int64 (N,).

    Raises:
        ValueError: the images are of several sizes, one is damaged, or `out` exists.
        OSError: reading or writing failed.
    """
    shards = open_shards(root)
    size = shards.image_size
    if size is None:
        raise ValueError(
            f"{shards.where} has images of several sizes: pack them without --keep-original"
        )
    if out.suffix != ".npz" or out.exists():
        raise ValueError(f"OUT = {out}: must be a new file with the suffix .npz")
    files.make_parent(out, option="OUT")
    labels = np.empty(shards.count, dtype=np.int64)

    def said(step: Step) -> str:
        return f"wrote {step.done} of {shards.count} images, {step.left} left"

    with files.whole(out) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as images:
            images.write(npz.image_header((shards.count, size, size, 3)))
            for i, stored in enumerate(with_progress(_all(shards), total=shards.count, said=said)):
                labels[i] = stored.label
                images.write(_pixels(stored, size))
        if shards.labelled:
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, labels)
    return shards


def _all(shards: Shards) -> Iterator[StoredImage]:
    stored = StoredImages(shards, config=FetchConfig())
    for number, shard in enumerate(shards.shards):
        for row in range(shard.samples):
            try:
                yield stored.read(number, row)
            except BadSampleError as error:
                raise ValueError(str(error)) from None
    stored.close()


def _pixels(stored: StoredImage, size: int) -> bytes:
    try:
        pixels = decode(stored.content)
    except UNDECODABLE as error:
        raise ValueError(f"{stored.where} cannot be decoded: {error}") from None
    if pixels.shape != (size, size, 3):
        raise ValueError(f"{stored.where} has another size than {size} x {size}")
    return pixels.tobytes()
