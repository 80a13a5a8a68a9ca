"""A packing job: the images of one shard in the plan -> its tar, its index, its manifest entry.

A job reads, crops and writes without knowing of the others, in whatever process or node runs it. A
shard gets its name when all of it is on disk, and a record of it is written last, so that the next
attempt keeps what is finished.
"""

import io
import json
import re
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data import files
from data.archives import open_source
from data.claim import WORK
from data.dataset import describe, file_sha256
from data.index import index_bytes
from data.manifest import Shard
from data.plan import PackConfig, PackJob
from data.sources import Source
from data.tars import Index, ShardWriter
from data.transforms import UNDECODABLE, center_crop, halve_and_scale, open_on_white

# Pillow's formats of files that are stored unchanged where no scaling is needed, and their suffix.
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished shard, and a line for each image that could not be decoded.

    `transparent` counts the images that are transparent somewhere.
    """

    shard: Shard
    left_out: tuple[str, ...]
    transparent: int = 0


def make_shard(job: PackJob) -> Made:
    """Make one shard, unless it is there already, finished and intact.

    Raises:
        ValueError: the source is not what was planned.
        OSError: reading or writing failed.
    """
    out = Path(job.out)
    record = out / WORK / f"{job.name}.json"
    if found := _finished(out, record):
        return found
    tar = out / f"{job.name}.tar"
    with files.whole(tar) as file:
        index, left_out, transparent = _write(job, file)
    content = index_bytes(index)
    files.write(out / f"{job.name}.idx.npy", content)
    shard = describe(tar, index, content)
    made = Made(shard=shard, left_out=tuple(left_out), transparent=transparent)
    files.write(record, json.dumps(asdict(made)))
    return made


def encode(content: bytes, *, config: PackConfig) -> tuple[bytes, str, bool]:
    """Crop or scale one image file as configured: the new file's bytes and suffix.

    The last value is whether the image is transparent somewhere.

    Raises:
        one of `UNDECODABLE`.
    """
    image, is_transparent = open_on_white(content)
    if not config.keep_original:
        image = Image.fromarray(center_crop(image, size=config.size))
    elif min(image.size) > config.size:
        image = halve_and_scale(image, side=config.size)
    else:
        kept = _KEPT_FORMATS.get(Image.open(io.BytesIO(content)).format or "")
        if kept:
            return content, kept, is_transparent
    buffer = io.BytesIO()
    if config.suffix == "png":
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=config.quality, subsampling=0)
    return buffer.getvalue(), config.suffix, is_transparent


def _write(job: PackJob, file: BinaryIO) -> tuple[Index, list[str], int]:
    """Write the tar; its index, a line for each image left out, and how many are transparent."""
    source = _source(job.source, job.out)
    left_out, transparent = [], 0
    writer = ShardWriter(file)
    for number, (name, label) in enumerate(job.images, start=job.first):
        try:
            image, suffix, is_transparent = encode(source.read(name), config=job.config)
        except (*UNDECODABLE, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a fault of the disk or network, not of the image
            left_out.append(f"{name}: {error}")
            continue
        transparent += is_transparent
        writer.add(_key(number, name), image=image, suffix=suffix, label=label)
    return writer.close(), left_out, transparent


def _key(number: int, name: str) -> str:
    """Unique by its number, and recognisable by the source's name; tar has room for 100 bytes."""
    return f"{number:08d}-" + re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]


def _finished(out: Path, record: Path) -> Made | None:
    if not record.exists():
        return None
    saved = json.loads(record.read_text())
    made = Made(
        shard=Shard(**saved["shard"]),
        left_out=tuple(saved["left_out"]),
        transparent=saved.get("transparent", 0),  # records of version 0.1 do not have it
    )
    for name, sha256 in (
        (made.shard.tar, made.shard.sha256),
        (made.shard.index, made.shard.index_sha256),
    ):
        if not (out / name).exists() or file_sha256(out / name) != sha256:
            return None
    return made


@lru_cache(maxsize=1)
def _source(text: str, out: str) -> Source:
    """The source, opened once in a process for all of its jobs."""
    return open_source(text, staging=Path(out) / WORK)
