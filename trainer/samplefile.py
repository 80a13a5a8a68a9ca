"""Sample files: parts that are drawn one by one become the evaluator's `.npz` and a PNG grid.

The `.npz` holds uint8 NHWC in `arr_0` and labels in `arr_1`, as ADM's evaluator reads it. Parts and
result are written whole or not at all, and no process ever holds all images.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.adm.unet import UNetConfig
from trainer.draw import tile

#: At most so many images stand in the PNG.
GRID = 100


def read_low_res(
    path: Path | None, *, model: UNetConfig, images: int
) -> tuple[NDArray[np.uint8] | None, NDArray[np.int64] | None]:
    """The images that an upsampler enlarges, uint8 (N, h, w, 3), and their labels if any.

    Raises:
        ValueError: the file is missing, or is not what the network enlarges.
    """
    if (path is None) != (model.small_size is None):
        needs = f"needs --low-res with {model.small_size} px images" if model.small_size else ""
        raise ValueError(f"this network {needs or 'is no upsampler: leave out --low-res'}")
    if path is None:
        return None, None
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels = file["arr_0"][:images]
            labels = file["arr_1"][:images] if "arr_1" in file else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--low-res {path} is no sample file: {error}") from None
    expected = (images, model.small_size, model.small_size, 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise ValueError(
            f"--low-res {path}: {pixels.dtype} {pixels.shape} instead of uint8 {expected}"
        )
    return pixels, labels


def open_parts(parts: Path, out: Path, request: Mapping[str, Any]) -> None:
    """Make the directory of the parts, or check that the one there is of the same request.

    Raises:
        ValueError: the samples are drawn already, or other ones are half drawn.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another --out, or remove it")
    record = parts / "request.json"
    wanted = json.loads(json.dumps(request))
    is_ours = record.exists() and json.loads(record.read_text()) == wanted
    if not is_ours and parts.exists() and any(parts.iterdir()):
        raise ValueError(
            f"{parts} holds parts of another request: remove it, or name another --out"
        )
    parts.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted))


def write_part(file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Put images, uint8 (B, 3, H, W), and labels (B,) on disk, whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, images=images.transpose(0, 2, 3, 1), labels=labels)
    partial.replace(file)


def merge(parts: Sequence[Path], out: Path, *, images: int, columns: int | None) -> None:
    """Join the parts' files into `out` and draw its grid, of so many `columns`."""
    partial = out.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for member, key in (("arr_0.npy", "images"), ("arr_1.npy", "labels")):
            with archive.open(member, "w", force_zip64=True) as stream:
                for file in parts:
                    with np.load(file) as part:
                        values = part[key]
                    if file is parts[0]:
                        header = np.lib.format.header_data_from_array_1_0(values)
                        header["shape"] = (images, *values.shape[1:])
                        np.lib.format.write_array_header_1_0(stream, header)
                    stream.write(np.ascontiguousarray(values).tobytes())
    grid = tile(_first(parts).transpose(0, 3, 1, 2), columns=columns)
    Image.fromarray(grid.transpose(1, 2, 0)).save(out.with_suffix(".png"))
    partial.replace(out)
    shutil.rmtree(parts[0].parent)


def _first(parts: Sequence[Path]) -> NDArray[np.uint8]:
    """The images that the grid shows, uint8 (N, H, W, 3)."""
    shown: list[NDArray[np.uint8]] = []
    for file in parts:
        if sum(map(len, shown)) < GRID:
            with np.load(file) as part:
                shown.append(part["images"])
    return np.concatenate(shown)[:GRID]
