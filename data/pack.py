"""Packing: images of any source -> shuffled shards, an index beside each, a manifest over all.

The plan comes first and is pure: which image goes into which shard at which place, by the seed
alone. Each shard is then an independent job, so the bytes do not depend on how many processes
work. A job writes aside and renames when done, so an interrupted packing continues where it was,
and `manifest.json` appears last: without it there is no dataset.

    python -m data.pack SOURCE OUT --size 64 [--class-map FILE] [--keep-original]
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from data.order import permutation
from data.shards import (
    MANIFEST,
    Shard,
    ShardWriter,
    file_sha256,
    index_bytes,
    manifest_text,
    open_shards,
)
from data.sources import Item, Source, open_source, read_class_map, relabel
from data.transforms import UNDECODABLE, center_crop, decode, halve_and_scale

WORK = ".packing"
LEFT_OUT = "left-out.txt"
_KEPT_AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to do with each image, and how to deal them to shards.

    `size` is the side of ADM's centre crop, or with `keep_original` the smaller side beyond which
    an image is scaled down, uncropped. `format` None takes png to 64 pixels, jpg above.
    """

    size: int
    keep_original: bool = False
    format: str | None = None
    quality: int = 95
    seed: int = 0
    per_shard: int = 2048

    def __post_init__(self) -> None:
        if self.size < 1 or self.per_shard < 1:
            raise ValueError(
                f"--size {self.size} and --per-shard {self.per_shard}: at least 1 each"
            )
        if self.format not in (None, "png", "jpg"):
            raise ValueError(f"--format = {self.format}: choose png or jpg")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality = {self.quality}: choose 1 to 100")

    @property
    def suffix(self) -> str:
        return self.format or ("png" if self.size <= 64 and not self.keep_original else "jpg")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to be made: its images in order, with labels by number."""

    name: str
    source: str
    out: str
    config: PackConfig
    first: int
    images: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished shard, and the images that could not be decoded."""

    shard: Shard
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All jobs of a packing; `digest` changes with anything that changes the shards."""

    jobs: tuple[Job, ...]
    classes: tuple[str, ...]
    config: PackConfig
    digest: str


def plan(items: list[Item], *, source: str, out: Path, config: PackConfig) -> Plan:
    """Shuffle the items globally by the seed and deal them to shards of equal size.

    Raises:
        ValueError: there are no images.
    """
    if not items:
        raise ValueError(f"SOURCE = {source} holds no images")
    classes = tuple(sorted({item.label for item in items}))
    number = {label: i for i, label in enumerate(classes)}
    mixed = [items[i] for i in permutation(len(items), config.seed)]
    # A few shards at least, even for small sets: epochs differ by the order of shards, too.
    per_shard = min(config.per_shard, -(-len(items) // 8))
    firsts = range(0, len(mixed), per_shard)
    jobs = tuple(
        Job(
            name=f"{i:05d}",
            source=source,
            out=str(out),
            config=config,
            first=first,
            images=tuple((x.name, number[x.label]) for x in mixed[first : first + per_shard]),
        )
        for i, first in enumerate(firsts)
    )
    text = json.dumps([asdict(config), classes, [job.images for job in jobs]])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Plan(jobs=jobs, classes=classes, config=config, digest=digest)


def pack(
    source: str, *, out: Path, config: PackConfig, class_map: Path | None, workers: int
) -> int:
    """Pack a source into `out`, or finish what an interrupted packing left there.

    Returns:
        the number of images left out because they could not be decoded.

    Raises:
        ValueError: the source has no images, or `out` holds something else.
        OSError: reading or writing failed, e.g. the disk is full; the same command continues.
    """
    items = open_source(source).items()
    if class_map:
        items = relabel(items, class_map=read_class_map(class_map))
    work = plan(items, source=source, out=out, config=config)
    if _already_packed(out, work):
        print(f"{out} holds this dataset already")
        return 0
    _claim(out, work)
    with _executor(workers) as executor:
        made = list(_with_progress(_results(work.jobs, executor), jobs=work.jobs))
    return _finish(out, work, sorted(made, key=lambda m: m.shard.name))


def make_shard(job: Job) -> Made:
    """Make one shard, unless a finished and intact one is there; write aside, then rename."""
    out = Path(job.out)
    record = out / WORK / f"{job.name}.json"
    found = _finished(out, record)
    if found:
        return found
    partial = out / WORK / f"{job.name}.partial"
    try:
        made = _write(job, partial)
        _write_atomically(record, json.dumps(asdict(made)))
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk the room matters more than the remains
        raise
    os.replace(partial, out / made.shard.tar)
    return made


def encode(blob: bytes, *, config: PackConfig) -> tuple[bytes, str]:
    """Crop or scale one image file as configured: its new bytes and their suffix.

    Raises:
        one of `UNDECODABLE`.
    """
    image = Image.fromarray(decode(blob))
    if not config.keep_original:
        image = Image.fromarray(center_crop(image, size=config.size))
    elif min(image.size) > config.size:
        image = halve_and_scale(image, side=config.size)
    else:
        kept = _KEPT_AS_THEY_ARE.get(Image.open(io.BytesIO(blob)).format or "")
        if kept:
            return blob, kept
    buffer = io.BytesIO()
    if config.suffix == "png":
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=config.quality, subsampling=0)
    return buffer.getvalue(), config.suffix


def _write(job: Job, partial: Path) -> Made:
    source, left_out = _source(job.source), []
    with partial.open("wb") as file:
        writer = ShardWriter(file)
        for number, (name, label) in enumerate(job.images, start=job.first):
            try:
                image, suffix = encode(source.read(name), config=job.config)
            except UNDECODABLE as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's or the network's fault, not the image's
                left_out.append(f"{name}: {error}")
                continue
            writer.add(_key(number, name), image=image, suffix=suffix, label=label)
        index = index_bytes(rows := writer.close())
        file.flush()
        os.fsync(file.fileno())
    _write_atomically(partial.parent.parent / f"{job.name}.idx.npy", index)
    shard = Shard(
        name=job.name,
        samples=len(rows),
        bytes=partial.stat().st_size,
        sha256=file_sha256(partial),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    return Made(shard=shard, left_out=tuple(left_out))


def _key(number: int, name: str) -> str:
    """Unique by its number, and recognisable by the source's name; tar has room for 100 bytes."""
    return f"{number:08d}-" + re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]


def _finished(out: Path, record: Path) -> Made | None:
    if not record.exists():
        return None
    saved = json.loads(record.read_text())
    made = Made(shard=Shard(**saved["shard"]), left_out=tuple(saved["left_out"]))
    for name, sha256 in (
        (made.shard.tar, made.shard.sha256),
        (made.shard.index, made.shard.index_sha256),
    ):
        if not (out / name).exists() or file_sha256(out / name) != sha256:
            return None
    return made


def _already_packed(out: Path, work: Plan) -> bool:
    if not (out / MANIFEST).exists():
        return False
    made_by = json.loads((out / MANIFEST).read_text()).get("made_by", {})
    if made_by.get("plan") != work.digest:
        raise ValueError(
            f"OUT = {out} holds another dataset (other images, --seed or options); "
            "choose another OUT or remove it"
        )
    open_shards(out)
    return True


def _claim(out: Path, work: Plan) -> None:
    mark = out / WORK / "plan"
    if mark.exists():
        if mark.read_text() != work.digest:
            raise ValueError(
                f"OUT = {out} holds another packing, unfinished; finish or remove that first"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"OUT = {out} is not empty and no packing; choose another OUT")
    mark.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(mark, work.digest)


def _finish(out: Path, work: Plan, made: list[Made]) -> int:
    left_out = [line for m in made for line in m.left_out]
    if left_out:
        _write_atomically(out / LEFT_OUT, "\n".join(left_out) + "\n")
        print(f"{len(left_out)} images could not be decoded: {out / LEFT_OUT}", file=sys.stderr)
    text = manifest_text(
        tuple(m.shard for m in made),
        classes=work.classes,
        image_size=None if work.config.keep_original else work.config.size,
        made_by={"plan": work.digest, **asdict(work.config)},
    )
    _write_atomically(out / MANIFEST, text)
    for file in (out / WORK).iterdir():
        file.unlink()
    (out / WORK).rmdir()
    return len(left_out)


def _executor(workers: int) -> AbstractContextManager[Executor | None]:
    if workers == 1:
        return nullcontext()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _results(jobs: tuple[Job, ...], executor: Executor | None) -> Iterator[Made]:
    if executor is None:
        yield from map(make_shard, jobs)
        return
    for future in as_completed([executor.submit(make_shard, job) for job in jobs]):
        yield future.result()


def _with_progress(made: Iterable[Made], *, jobs: tuple[Job, ...]) -> Iterator[Made]:
    images = sum(len(job.images) for job in jobs)
    begin, done, shown = time.monotonic(), 0, 0.0
    for shards, one in enumerate(made, start=1):
        done += one.shard.samples + len(one.left_out)
        seconds = time.monotonic() - begin
        if seconds - shown > 1 or shards == len(jobs):
            left = time.strftime("%H:%M:%S", time.gmtime(seconds / done * (images - done)))
            print(
                f"packed {shards} of {len(jobs)} shards, {done} of {images} images, "
                f"{done / seconds:.0f} images/s, {left} left",
                file=sys.stderr,
            )
            shown = seconds
        yield one


def _write_atomically(path: Path, content: str | bytes) -> None:
    aside = path.with_name(f"{path.name}.new")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@lru_cache(maxsize=1)
def _source(text: str) -> Source:
    return open_source(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python -m data.pack`."""
    parser = argparse.ArgumentParser(prog="python -m data.pack", description="Pack images.")
    parser.add_argument("source", help="image folder, or `digits`")
    parser.add_argument("out", type=Path, help="directory of the dataset")
    parser.add_argument("--size", type=int, required=True, help="side in pixels")
    parser.add_argument(
        "--keep-original", action="store_true", help="no crop; scale down to --size"
    )
    parser.add_argument("--class-map", type=Path, help="lines of NAME CLASS instead of directories")
    parser.add_argument("--format", choices=("png", "jpg"), help="default: png up to 64 pixels")
    parser.add_argument("--quality", type=int, default=95, help="of jpg")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle")
    parser.add_argument("--per-shard", type=int, default=2048, help="images in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = vars(parser.parse_args(arguments))
    source, out, workers = options.pop("source"), options.pop("out"), options.pop("workers")
    class_map = options.pop("class_map")
    try:
        config = PackConfig(**options)
        pack(source, out=out, config=config, class_map=class_map, workers=workers)
    except (ValueError, OSError) as error:
        print(f"packing stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
