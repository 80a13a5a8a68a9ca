"""Sample files: parts that are drawn one by one become the evaluator's `.npz` and a PNG grid.

The `.npz` holds uint8 NHWC in `arr_0` and labels in `arr_1`, as ADM's evaluator reads it. Parts and
result are written whole or not at all, and no process ever holds all images.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import files
from trainer.adm.config import UNetConfig
from trainer.draw import tile
from trainer.ranks import lease as leases

# The most images in the PNG.
GRID = 100
# The file beside the parts that records their request.
REQUEST = "request.json"


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
    except Exception as error:  # numpy and zipfile raise errors of many types for other files
        raise ValueError(f"--low-res {path} is not a readable sample file: {error}") from None
    expected = (images, model.small_size, model.small_size, 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise ValueError(
            f"--low-res {path}: {pixels.dtype} {pixels.shape} instead of uint8 {expected}"
        )
    if labels is not None and (labels.shape != (images,) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"--low-res {path}: labels are {labels.dtype} {labels.shape} instead of "
            f"integers {(images,)}"
        )
    return pixels, labels


def open_parts(parts: Path, out: Path, request: Mapping[str, Any]) -> None:
    """Make the directory of the parts, or check that the one there is of the same request.

    Raises:
        ValueError: the samples are drawn already, other ones are half drawn, or it cannot be known
            of which request the parts are.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another --out, or remove it")
    wanted = json.loads(json.dumps(request))
    recorded = _recorded(parts / REQUEST)
    if recorded == wanted:
        return
    if recorded is not None:
        differing = [
            f"{name} was {recorded.get(name)!r}, is {wanted.get(name)!r}"
            for name in {**recorded, **wanted}
            if recorded.get(name) != wanted.get(name)
        ]
        raise ValueError(
            f"{parts} holds parts of another request ({'; '.join(differing)}): give the same "
            "options, remove it, or name another --out"
        )
    left = sorted(path.name for path in parts.iterdir()) if parts.exists() else []
    if any(name.endswith(".npz") for name in left):
        raise ValueError(
            f"{parts / REQUEST} is missing or damaged, so it is not known of which request "
            f"the parts beside it are: remove {parts} to draw them again, or name another --out"
        )
    known = (REQUEST, "launch")
    if foreign := [n for n in left if n not in known and not n.endswith(".partial")]:
        raise ValueError(f"{parts} holds other files ({foreign[0]}): name another --out")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        files.write(parts / REQUEST, json.dumps(wanted))
        files.sync(parts.parent)
    except OSError as error:
        raise ValueError(f"cannot write {parts}: {error}; name another --out") from None


@contextmanager
def claimed(parts: Path) -> Iterator[None]:
    """The right to draw these parts while entered.

    Raises:
        ValueError: another process is drawing them.
    """
    if (busy := leases.live_holder(parts)) is not None:
        raise ValueError(f"{busy} is drawing {parts}: wait for it, or name another --out")
    lease = leases.claim(parts)
    try:
        yield
    finally:
        lease.release()


def _recorded(record: Path) -> dict[str, Any] | None:
    """The request that a directory of parts is of; None where the record is missing or damaged."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_part(file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Put images, uint8 (B, 3, H, W), and labels (B,) on disk, whole or not at all."""
    with files.whole(file) as stream:
        np.savez(stream, images=images.transpose(0, 2, 3, 1), labels=labels)


def part_fault(file: Path, *, shape: tuple[int, ...], labels: NDArray[np.int64]) -> str | None:
    """Why `file` is not a part with uint8 images of `shape`, (B, H, W, 3), and these labels (B,).

    Reads every byte.
    """
    try:
        images, recorded = _read(file, "images"), _read(file, "labels")
    except ValueError as error:
        return str(error)
    if images.dtype != np.uint8 or images.shape != shape:
        return f"its images are {images.dtype} {images.shape} instead of uint8 {shape}"
    if recorded.dtype != np.int64 or not np.array_equal(recorded, labels):
        return "its labels are not those of the request"
    return None


def merge(parts: Sequence[Path], out: Path, *, images: int, columns: int | None) -> None:
    """Join the parts' files into `out`, draw its grid of so many `columns`, remove the parts.

    Raises:
        ValueError: `out` was written by another process, or a part was damaged since it was drawn.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another --out, or remove it")
    grid = tile(_first(parts).transpose(0, 3, 1, 2), columns=columns)
    with files.whole(out.with_suffix(".png")) as stream:
        Image.fromarray(grid.transpose(1, 2, 0)).save(stream, format="png")
    with files.whole(out) as stream, zipfile.ZipFile(stream, "w") as archive:
        for member, key in (("arr_0.npy", "images"), ("arr_1.npy", "labels")):
            with archive.open(member, "w", force_zip64=True) as content:
                for number, values in enumerate(_arrays(parts, key)):
                    if number == 0:
                        header = np.lib.format.header_data_from_array_1_0(values)
                        header["shape"] = (images, *values.shape[1:])
                        np.lib.format.write_array_header_1_0(content, header)
                    content.write(np.ascontiguousarray(values).tobytes())
    # The request goes last: an interruption in between must not leave parts without it.
    for file in parts:
        file.unlink()
    shutil.rmtree(parts[0].parent)


def _first(parts: Sequence[Path]) -> NDArray[np.uint8]:
    """The images that the grid shows, uint8 (N, H, W, 3)."""
    shown: list[NDArray[np.uint8]] = []
    for images in _arrays(parts, "images"):
        shown.append(images)
        if sum(map(len, shown)) >= GRID:
            break
    return np.concatenate(shown)[:GRID]


def _arrays(parts: Sequence[Path], key: str) -> Iterator[NDArray[Any]]:
    """One array of each part in turn."""
    for file in parts:
        try:
            values = _read(file, key)
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged: {error}; rerun the same command to draw it again"
            ) from None
        yield values


def _read(file: Path, key: str) -> NDArray[Any]:
    """One array of a part, compared with its checksum.

    Raises:
        ValueError: why it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            content = archive.read(f"{key}.npy")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # zipfile raises errors of many types for damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from None
