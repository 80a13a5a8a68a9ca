"""Packing: images of any source -> shuffled shards, an index beside each, a manifest over all.

The plan comes first and is pure: which image goes into which shard at which place, by the seed
alone. Each shard is then an independent job, so the bytes do not depend on how many processes
work, or on how many nodes. A job writes aside and renames when done, so an interrupted packing
continues where it was, and `manifest.json` appears last: without it there is no dataset.

    python -m data.pack SOURCE OUT --size 64
    mpirun -n 128 python -m mpi4py.futures -m data.pack SOURCE OUT --size 256 --mpi
"""

import argparse
import fcntl
import io
import json
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from data.archives import open_source
from data.manifest import NO_CLASS, parse_manifest
from data.plan import Job, PackConfig, Plan, plan
from data.shards import (
    MANIFEST,
    Shard,
    describe,
    file_sha256,
    index_bytes,
    manifest_text,
    open_shards,
    write_atomically,
)
from data.sources import Listing, Source, relabel, renumber
from data.tars import ShardWriter
from data.transforms import UNDECODABLE, center_crop, halve_and_scale, open_rgb
from launch.world import mpi_executor

WORK = ".packing"
LEFT_OUT = "left-out.txt"
_KEPT_AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished shard, and the images that could not be decoded."""

    shard: Shard
    left_out: tuple[str, ...]


def pack(
    source: str,
    *,
    out: Path,
    config: PackConfig,
    class_map: Path | None = None,
    classes_of: Path | None = None,
    executor: AbstractContextManager[Executor | None] | None = None,
) -> int:
    """Pack a source into `out`, or finish what an interrupted packing left there.

    Args:
        class_map: lines of NAME CLASS, or of CLASS in the names' order, where directories are not
            the classes.
        classes_of: a dataset whose numbering of the classes is to be used.
        executor: runs the jobs; this process, if None.

    Returns:
        the number of images left out because they could not be decoded.

    Raises:
        ValueError: the source has no images, or `out` holds something else.
        OSError: reading or writing failed, e.g. the disk is full; the same command continues.
    """
    with _claimed(out):
        listing = open_source(source, staging=out / WORK).listing()
        if class_map:
            listing = relabel(listing, class_map=class_map)
        _tell_of_missing_labels(listing, source)
        if classes_of:
            listing = renumber(listing, classes=open_shards(classes_of).classes)
        work = plan(listing, source=source, out=out, config=config)
        if _already_packed(out, work):
            print(f"{out} holds this dataset already", file=sys.stderr)
            return 0
        with executor or nullcontext() as running:
            made = list(_with_progress(_results(work.jobs, running), jobs=work.jobs))
        return _finish(out, work, sorted(made, key=lambda m: m.shard.name))


def _tell_of_missing_labels(listing: Listing, source: str) -> None:
    if NO_CLASS in listing.classes:
        count = listing.labels.count(listing.classes.index(NO_CLASS))
        print(
            f"SOURCE = {source}: {count} of {len(listing.names)} images have no label; "
            "networks with classes (model.num_classes) do not train on them",
            file=sys.stderr,
        )


def make_shard(job: Job) -> Made:
    """Make one shard, unless a finished and intact one is there; write aside, then rename."""
    out = Path(job.out)
    record = out / WORK / f"{job.name}.json"
    found = _finished(out, record)
    if found:
        return found
    aside = out / WORK / f"{job.name}.tar"
    try:
        made = _write(job, aside)
        os.replace(aside, out / aside.name)
    finally:
        aside.unlink(missing_ok=True)  # on a full disk the room matters more than the remains
    write_atomically(record, json.dumps(asdict(made)).encode())
    return made


def encode(blob: bytes, *, config: PackConfig) -> tuple[bytes, str]:
    """Crop or scale one image file as configured: its new bytes and their suffix.

    Raises:
        one of `UNDECODABLE`.
    """
    image = open_rgb(blob)
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


def _write(job: Job, aside: Path) -> Made:
    source = _source(job.source, job.out)
    left_out = []
    with aside.open("wb") as file:
        writer = ShardWriter(file)
        for number, (name, label) in enumerate(job.images, start=job.first):
            try:
                image, suffix = encode(source.read(name), config=job.config)
            except (*UNDECODABLE, zipfile.BadZipFile, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's or the network's fault, not the image's
                left_out.append(f"{name}: {error}")
                continue
            writer.add(_key(number, name), image=image, suffix=suffix, label=label)
        index = writer.close()
        file.flush()
        os.fsync(file.fileno())
    content = index_bytes(index)
    write_atomically(Path(job.out) / f"{job.name}.idx.npy", content)
    return Made(shard=describe(aside, index, content), left_out=tuple(left_out))


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
    """Whether `out` is finished; otherwise mark it as being made by this plan."""
    found, mark = None, out / WORK / "plan"
    if (out / MANIFEST).exists():
        content = (out / MANIFEST).read_bytes()
        parse_manifest(str(out), content)
        found = json.loads(content).get("made_by", {}).get("plan")
    elif mark.exists():
        found = mark.read_text()
    if found not in (None, work.digest):
        raise ValueError(
            f"OUT = {out} holds another dataset (other images, classes, --seed or options); "
            "choose another OUT or remove it"
        )
    if (out / MANIFEST).exists():
        open_shards(out)
        return True
    write_atomically(mark, work.digest.encode())
    return False


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold `out` alone; it must be new, empty, or a packing."""
    if out.exists() and not {WORK, MANIFEST} & set(os.listdir(out)) and any(out.iterdir()):
        raise ValueError(f"OUT = {out} is not empty and no packed dataset; choose another OUT")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    held = False
    try:
        with (out / WORK / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"OUT = {out}: another process is packing there") from None
            except OSError as error:  # some parallel file systems have no locks
                print(f"{out} cannot be locked ({error}): pack there once only", file=sys.stderr)
            held = True
            yield
    finally:  # not before the lock is closed: network file systems keep what is open
        if held and ((out / MANIFEST).exists() or os.listdir(out / WORK) == ["lock"]):
            shutil.rmtree(out / WORK, ignore_errors=True)


def _finish(out: Path, work: Plan, made: list[Made]) -> int:
    left_out = [line for m in made for line in m.left_out]
    if left_out:
        write_atomically(out / LEFT_OUT, ("\n".join(left_out) + "\n").encode())
        print(f"{len(left_out)} images could not be decoded: {out / LEFT_OUT}", file=sys.stderr)
    text = manifest_text(
        tuple(m.shard for m in made),
        classes=work.classes,
        image_size=None if work.config.keep_original else work.config.size,
        made_by={"plan": work.digest, **asdict(work.config)},
    )
    write_atomically(out / MANIFEST, text.encode())
    return len(left_out)


def _results(jobs: tuple[Job, ...], executor: Executor | None) -> Iterator[Made]:
    if executor is None:
        yield from map(make_shard, jobs)
        return
    try:
        for future in as_completed([executor.submit(make_shard, job) for job in jobs]):
            yield future.result()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise


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


@lru_cache(maxsize=1)
def _source(text: str, out: str) -> Source:
    return open_source(text, staging=Path(out) / WORK)


def _executor(workers: int, mpi: bool) -> AbstractContextManager[Executor]:
    return mpi_executor() if mpi else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.pack", description="Pack images.")
    parser.add_argument("source", help="folder, zip, tars, parquet or lmdb of images, or `digits`")
    parser.add_argument("out", type=Path, help="directory of the dataset")
    parser.add_argument("--size", type=int, default=256, help="side of the crop in pixels")
    parser.add_argument(
        "--keep-original",
        action="store_true",
        help="no crop, for random crops in training; a smaller side beyond --size is scaled down",
    )
    parser.add_argument("--class-map", type=Path, help="lines of NAME CLASS, or of CLASS in order")
    parser.add_argument("--classes-of", type=Path, help="number classes as this dataset does")
    parser.add_argument("--format", choices=("png", "jpg"), help="default: png up to 64 pixels")
    parser.add_argument("--quality", type=int, default=95, help="of jpg")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle")
    parser.add_argument("--per-shard", type=int, default=2048, help="images in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="local processes")
    parser.add_argument("--mpi", action="store_true", help="work on all ranks of mpirun instead")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python -m data.pack`."""
    options = vars(_parser().parse_args(arguments))
    where = {name: options.pop(name) for name in ("source", "out", "class_map", "classes_of")}
    try:
        executor = _executor(options.pop("workers"), options.pop("mpi"))
        pack(where.pop("source"), config=PackConfig(**options), executor=executor, **where)
    except (ValueError, OSError, BrokenExecutor) as error:
        print(f"packing stopped: {error}", file=sys.stderr)
        if not isinstance(error, ValueError):
            print("the same command continues; finished shards are kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
