"""A packing job: the images of one shard in the plan -> its tar, its index, its manifest entry.

Jobs are independent of each other, in whatever process or node they run. A shard gets its name when
all of it is on disk, and its record in `WORK` is written last, so that another start keeps it.
"""

import errno
import io
import json
import math
import re
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from data import files
from data.dataset import write_index
from data.index import Index
from data.manifest import Shard
from data.packing import claim
from data.packing.claim import WORK
from data.packing.kinds import open_source
from data.packing.plan import PackConfig, PackJob
from data.packing.sources import Source
from data.tars import ShardWriter
from data.transforms import UNDECODABLE, center_crop, halve_and_scale, open_over

# Errors of reading that concern one file; any other one stops the packing.
_OF_A_FILE = {
    errno.EACCES,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
    errno.ESTALE,
}

# Pillow's formats of files that are stored unchanged where no scaling is needed, and their suffix.
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png"}
# Those of animations and of files with pages.
_OF_SEVERAL = {"AVIF", "GIF", "PNG", "TIFF", "WEBP"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished shard, and what its images were like; its record on disk has these fields."""

    shard: Shard
    #: A line for each image that is not in it: name and reason.
    left_out: tuple[str, ...]
    #: The names of these images.
    missed: tuple[str, ...] = ()
    #: How many of these could not be read, or were changed since the packing began.
    unreadable: int = 0
    #: Images that are transparent somewhere.
    transparent: int = 0
    #: Images of 16 bits that use at most 12.
    dim: int = 0
    #: Images that have an EXIF orientation, by which they would be turned.
    turned: int = 0
    #: Images smaller than `--size`.
    enlarged: int = 0
    #: Files of several pictures, of which the first is taken.
    several: int = 0
    #: Names of images with more pixels than Pillow's limit.
    huge: tuple[str, ...] = ()


class Encoded(NamedTuple):
    """An image as it is stored: its bytes and suffix, and the fields of `Made` that count it."""

    content: bytes
    suffix: str
    traits: frozenset[str]


class TooManyLeftOut(ValueError):
    """More images were left out than `--max-bad` allows; the arguments are a line for each."""


def make_shard(job: PackJob) -> Made:
    """Make one shard, unless it is finished and intact.

    A finished one is made again if some of its images could not be read.

    Raises:
        TooManyLeftOut: more images than the job allows.
        ValueError: the source is not what was planned.
        OSError: reading or writing failed.
    """
    out = job.out
    record = out / WORK / f"{job.name}.json"
    if found := _finished(out, record):
        return found
    tar, ours = out / f"{job.name}.tar", claim.writer()
    with files.whole(tar, writer=ours) as file:
        index, missed, noted = _write(job, file)
    made = Made(
        shard=write_index(tar, index, writer=ours),
        left_out=tuple(f"{one.name}: {one.why}" for one in missed),
        missed=tuple(one.name for one in missed),
        unreadable=sum(one.is_unreadable for one in missed),
        **noted,
    )
    files.write(record, json.dumps(asdict(made)), writer=ours)
    return made


def left_out_of(out: Path) -> dict[Path, list[str]]:
    """The records of shards from which images are missing, and the names of those images."""
    found = {}
    for record in (out / WORK).glob("*.json"):
        if record.stem.isdecimal() and (missed := json.loads(record.read_text()).get("missed")):
            found[record] = missed
    return found


def encode(content: bytes, *, config: PackConfig) -> Encoded:
    """Crop or scale one image file as configured, or raise one of `UNDECODABLE`."""
    with warnings.catch_warnings():
        # Pillow warns of images with very many pixels; the summary names them instead.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _encode(content, config)


def _encode(content: bytes, config: PackConfig) -> Encoded:
    image, is_transparent, is_dim, turn = open_over(content, config.background)
    # Pillow would store this with the pixels: comments too long for JPEG, a transparent colour that
    # scaling may produce, a profile for LAB images that contains the time.
    image.info = {}
    has = {
        "transparent": is_transparent,
        "dim": is_dim,
        "turned": turn is not None,
        "enlarged": min(image.size) < config.size,
        "several": _is_several(content),
        "huge": image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf),
    }
    traits = frozenset(trait for trait in has if has[trait])
    applied = turn if config.exif_transpose else None
    if applied is not None:
        image = image.transpose(applied)
    # A file that is kept unchanged is decoded over white in training.
    changed = applied is not None or (is_transparent and config.background != "white")
    if not config.keep_original:
        image = Image.fromarray(center_crop(image, size=config.size))
    elif min(image.size) > config.size:
        image = halve_and_scale(image, side=config.size)
    elif not changed:
        kept = _KEPT_FORMATS.get(Image.open(io.BytesIO(content)).format or "")
        if kept:
            return Encoded(content, kept, traits)
    buffer = io.BytesIO()
    if config.suffix == "png":
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=config.quality, subsampling=0)
    return Encoded(buffer.getvalue(), config.suffix, traits)


def _is_several(content: bytes) -> bool:
    """Whether a file has more pictures than its first: an animation, or pages."""
    if content[:2] == b"\xff\xd8":  # JPEG: the further ones, if any, are previews
        return False
    try:
        image = Image.open(io.BytesIO(content))
        return image.format in _OF_SEVERAL and getattr(image, "n_frames", 1) > 1
    except Exception:  # damage behind the first picture raises errors of any type
        return False


class _Missed(NamedTuple):
    """An image that is left out, and why."""

    name: str
    why: str
    is_unreadable: bool


def _write(job: PackJob, file: BinaryIO) -> tuple[Index, list[_Missed], dict[str, Any]]:
    """Write the tar; its index, the images left out, and what `Made` tells of the others."""
    source = _source(job.source, job.out)
    missed, huge, counted = [], [], Counter[str]()
    writer = ShardWriter(file)
    for number, (name, label) in enumerate(job.images, start=job.first):
        try:
            content = _read(source, job, name)
            image = encode(content, config=job.config)
        except (*UNDECODABLE, _UnreadableError) as error:
            missed.append(_Missed(name, str(error), isinstance(error, _UnreadableError)))
            if job.most_left_out is not None and len(missed) > job.most_left_out:
                raise TooManyLeftOut(*(f"{one.name}: {one.why}" for one in missed)) from None
            continue
        counted.update(image.traits)
        huge += [name] * ("huge" in image.traits)
        writer.add(_key(number, name), image=image.content, suffix=image.suffix, label=label)
    return writer.close(), missed, {**counted, "huge": tuple(huge)}


class _UnreadableError(Exception):
    """An image could not be read, or is not the one that was planned."""


def _read(source: Source, job: PackJob, name: str) -> bytes:
    """The bytes of one image file, as they were when the packing began.

    Raises:
        _UnreadableError: it cannot be read, or was changed since.
        ValueError: it is damaged within its archive.
        OSError: a fault of the machine that is no fault of the file.
    """
    holder = source.holder(name)
    known = job.stamps.get(holder)
    try:
        content = source.read(name)
        changed = known is not None and source.stamp(holder) != known
    except OSError as error:
        if error.errno not in _OF_A_FILE:
            raise
        raise _UnreadableError(f"it cannot be read ({error.strerror})") from None
    if changed:
        raise _UnreadableError(f"{holder} was changed since the packing began")
    return content


def _key(number: int, name: str) -> str:
    """A unique number, then the name in the source, cut: a tar header has room for 100 bytes."""
    return f"{number:08d}-" + re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]


def _finished(out: Path, record: Path) -> Made | None:
    """The recorded shard, if it is intact and lacks no image that could not be read."""
    if not record.exists():
        return None
    saved = json.loads(record.read_text())
    # Records of version 0.1 lack some fields.
    saved = {each.name: saved[each.name] for each in fields(Made) if each.name in saved}
    lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
    made = Made(**{**saved, **lists, "shard": Shard(**saved["shard"])})
    with suppress(FileNotFoundError):
        return made if not made.unreadable and made.shard.is_intact(out) else None
    return None


@lru_cache(maxsize=1)
def _source(text: str, out: Path) -> Source:
    """The source, opened once in a process for all of its jobs."""
    return open_source(text, staging=out / WORK)
