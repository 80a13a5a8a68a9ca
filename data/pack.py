"""Packing: images of any source -> shuffled shards, an index beside each, a manifest over all.

The plan comes first and is pure: which image goes into which shard at which place, by the seed
alone. Each shard is then an independent job (`data.jobs`), so the bytes do not depend on how many
processes or nodes work. After an interruption the same command keeps the finished shards and makes
the others. `manifest.json` is written last: without it there is no dataset.

    python -m data.pack SOURCE OUT --size 64
    mpirun -n 128 python -m mpi4py.futures -m data.pack SOURCE OUT --size 256 --mpi
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from data import files
from data.archives import open_source
from data.claim import PLAN, WORK, claimed
from data.config import check
from data.dataset import open_shards
from data.exits import REFUSED, REPORTED, CommandParser, exit_status
from data.jobs import Made, make_shard
from data.listing import Listing, relabel, renumber
from data.manifest import MANIFEST, NO_CLASS, manifest_text, parse_manifest
from data.plan import PackConfig, PackJob, PackPlan, plan
from data.progress import duration

LEFT_OUT = "left-out.txt"
# Classes that the closing line names.
_LISTED = 5


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
        classes_of: a dataset whose class numbers to use.
        executor: runs the jobs; this process, if None.

    Returns:
        the number of images left out because they could not be decoded.

    Raises:
        ValueError: the source has no images, or `out` holds something else.
        OSError: reading or writing failed, e.g. the disk is full; finished shards are kept.
    """
    with claimed(out):
        listing = open_source(source, staging=out / WORK).listing()
        if class_map:
            listing = relabel(listing, class_map=class_map)
        if listing.fault:
            raise ValueError(listing.fault)
        _warn_of_missing_labels(listing, source)
        if classes_of:
            listing = renumber(listing, classes=open_shards(classes_of).classes)
        work = plan(listing, source=source, out=out, config=config)
        if _already_packed(out, work):
            print(f"{out} holds this dataset already", file=sys.stderr)
            return 0
        with executor or nullcontext() as running:
            made = list(_with_progress(_results(work.jobs, running), jobs=work.jobs))
        made.sort(key=lambda m: m.shard.name)
        return _finish(out, work, made, listing)


def _warn_of_missing_labels(listing: Listing, source: str) -> None:
    if NO_CLASS in listing.classes:
        count = listing.labels.count(listing.classes.index(NO_CLASS))
        print(
            f"SOURCE = {source}: {count} of {len(listing.names)} images have no label; "
            "they cannot train a network with classes (model.num_classes)",
            file=sys.stderr,
        )


def _already_packed(out: Path, work: PackPlan) -> bool:
    """Whether `out` is finished; otherwise record there that this plan makes it."""
    found, mark = None, out / WORK / PLAN
    if (out / MANIFEST).exists():
        content = (out / MANIFEST).read_bytes()
        parse_manifest(f"{out}/{MANIFEST}", content)
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
    files.write(mark, work.digest)
    return False


def _finish(out: Path, work: PackPlan, made: list[Made], listing: Listing) -> int:
    left_out = [line for m in made for line in m.left_out]
    if left_out:
        files.write(out / LEFT_OUT, "\n".join(left_out) + "\n")
        print(f"{len(left_out)} images could not be decoded: {out / LEFT_OUT}", file=sys.stderr)
    text = manifest_text(
        tuple(m.shard for m in made),
        classes=work.classes,
        image_size=None if work.config.keep_original else work.config.size,
        made_by={"plan": work.digest, **asdict(work.config)},
    )
    files.write(out / MANIFEST, text)
    transparent = sum(m.transparent for m in made)
    summary = _summary(listing, left_out=len(left_out), transparent=transparent)
    print(summary, file=sys.stderr)
    return len(left_out)


def _summary(listing: Listing, *, left_out: int, transparent: int) -> str:
    """What was packed and what was not, in one line."""
    names = [name or "(none)" for name in listing.classes]
    shown = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    alpha = f", {transparent} with transparency (now on white)" if transparent else ""
    return (
        f"{len(listing.names) - left_out} images in {len(names)} "
        f"class{'es' if len(names) > 1 else ''} ({shown}), {left_out} left out, "
        f"{listing.skipped_by_kind}{alpha}"
    )


def _results(jobs: tuple[PackJob, ...], executor: Executor | None) -> Iterator[Made]:
    if executor is None:
        yield from map(make_shard, jobs)
        return
    try:
        for future in as_completed([executor.submit(make_shard, job) for job in jobs]):
            yield future.result()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise


def _with_progress(made: Iterable[Made], *, jobs: tuple[PackJob, ...]) -> Iterator[Made]:
    """Pass finished shards on, and print at most once a second how far they have come."""
    images = sum(len(job.images) for job in jobs)
    begin, done, shown = time.monotonic(), 0, 0.0
    for shards, one in enumerate(made, start=1):
        done += one.shard.samples + len(one.left_out)
        seconds = time.monotonic() - begin
        if seconds - shown > 1 or shards == len(jobs):
            print(
                f"packed {shards} of {len(jobs)} shards, {done} of {images} images, "
                f"{done / seconds:.0f} images/s, "
                f"{duration(seconds / done * (images - done))} left",
                file=sys.stderr,
            )
            shown = seconds
        yield one


def _executor(workers: int, mpi: bool) -> AbstractContextManager[Executor]:
    check(workers >= 1, "--workers", workers, "at least 1")
    return _mpi_executor() if mpi else ProcessPoolExecutor(workers, get_context("spawn"))


def _mpi_executor() -> Executor:
    """Runs jobs on the other ranks of `mpirun -n N python -m mpi4py.futures -m data.pack`.

    Raises:
        ValueError: there are no other ranks.
    """
    from mpi4py import MPI  # starts MPI, which only --mpi needs
    from mpi4py.futures import MPIPoolExecutor

    if MPI.COMM_WORLD.size < 2:
        raise ValueError(
            "--mpi needs at least 2 ranks: run "
            "`mpirun -n N python -m mpi4py.futures -m data.pack ... --mpi`"
        )
    return MPIPoolExecutor()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m data.pack",
        description="Pack images into shuffled shards. After an interruption, run the same command "
        "again: finished shards are kept.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder, zip, tars, parquet or lmdb of images, or a pattern of files such as "
        "'DIR/*train*.tar'; or digits",
    )
    add("out", metavar="OUT", type=Path, help="directory of the dataset; made if it is missing")
    add("--size", type=int, default=256, help="side of the crop in pixels (default: %(default)s)")
    add(
        "--keep-original",
        action="store_true",
        help="store images uncropped, for random crops in training, and scale down those whose "
        "smaller side is above --size (default: crop)",
    )
    add(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="lines of NAME CLASS, or one CLASS for each image in the order of the names "
        "(default: classes of the source)",
    )
    add(
        "--classes-of",
        type=Path,
        metavar="DIR",
        help="number the classes as this packed dataset does (default: in sorted order)",
    )
    add(
        "--format",
        choices=("png", "jpg"),
        help="format of the stored images (default: png up to 64 pixels, otherwise jpg)",
    )
    add("--quality", type=int, default=95, help="quality of jpg, 1 to 100 (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the global shuffle (default: %(default)s)")
    add("--per-shard", type=int, default=2048, help="images in a shard (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes on this machine (default: one for each CPU, here %(default)s)",
    )
    add(
        "--mpi",
        action="store_true",
        help="use the ranks of mpirun as workers (default: processes on this machine)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m data.pack`; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    where = {name: options.pop(name) for name in ("source", "out", "class_map", "classes_of")}
    try:
        executor = _executor(options.pop("workers"), options.pop("mpi"))
        pack(where.pop("source"), config=PackConfig(**options), executor=executor, **where)
    except REPORTED as error:
        status = exit_status(error)
        print(f"packing stopped: {error}", file=sys.stderr)
        if status != REFUSED:
            print("rerun the same command to continue; finished shards are kept", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
