"""Packing: images of any source -> shuffled shards, an index beside each, a manifest over all.

First comes the plan, a pure function of listing and seed: which image goes to which place of which
shard. Each shard is then an independent job (`data.packing.jobs`), so the bytes do not depend on
the number of processes or nodes. What the packing began with is recorded (`data.packing.begun`):
after an interruption, the same command keeps finished shards and makes the others. `manifest.json`
is written last; without it there is no dataset.

    python -m data.pack SOURCE OUT --size 64
    mpirun -n 128 python -m mpi4py.futures -m data.pack SOURCE OUT --size 256 --mpi
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from math import ceil
from pathlib import Path

from data import files, pool
from data.config import check
from data.dataset import open_shards
from data.exits import REFUSED, REPORTED, TO_BE_CONTINUED, exit_status, reported
from data.manifest import MANIFEST, manifest_text, parse_manifest
from data.packing import begun
from data.packing.begun import Begun, Request
from data.packing.claim import LEFT_OUT, PLAN, WORK, claimed
from data.packing.jobs import Made, TooManyLeftOut, make_shard
from data.packing.kinds import open_source
from data.packing.listing import Listing
from data.packing.options import FEW, parser
from data.packing.plan import PackConfig, PackJob, PackPlan, plan
from data.packing.report import dry_run, summary, with_progress

_CONTINUE = "rerun the same command to continue; finished shards are kept"
# The variables in which Open MPI, MPICH and Slurm say how many ranks they have started.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# Images left out that a message shows.
_SHOWN = 3


def pack(
    wanted: Request,
    *,
    out: Path,
    max_bad: float = 0.01,
    again: bool = False,
    executor: AbstractContextManager[Executor | None] | None = None,
) -> int:
    """Pack a source into `out`, or finish what an interrupted packing left there.

    Args:
        max_bad: the share of images that may be left out.
        again: try again what an earlier packing left out.
        executor: runs the jobs; this process, if None.

    Returns:
        the number of images left out because they could not be read or decoded.

    Raises:
        ValueError: the source has no images, too many cannot be decoded, or `out` holds something
            else.
        OSError: reading or writing failed, e.g. the disk is full; finished shards are kept.
    """
    check(0 <= max_bad <= 1, "--max-bad", max_bad, "a share between 0 and 1")
    with claimed(out):
        images = open_source(wanted.source, staging=out / WORK)
        before, request = begun.load(out), wanted.values()
        start = before
        if start is None or start.request != request:
            listing = wanted.listing(images)
            stamps = begun.stamps_of(images, listing.names)
            start = Begun(request=request, listing=listing, stamps=stamps)
        work = plan(start.listing, source=wanted.source, out=out, config=wanted.config)
        if _already_packed(out, work, before=before, start=start, again=again):
            print(
                f"{out} is packed already, of images with these names, classes and options; to "
                "pack others, choose another OUT or remove it",
                file=sys.stderr,
            )
            return 0
        if again:  # the shards from which images are missing are made again
            start = begun.again(start, out=out, source=images)
        elif start is not before:
            begun.save(start, out)
        files.write(out / WORK / PLAN, work.digest)
        images.stage()
        most = max(ceil(max_bad * len(start.listing.names)), FEW if max_bad else 0)
        jobs = begun.ready_jobs(work, start, source=images, most_left_out=most)
        with executor or nullcontext() as running:
            results = with_progress(_results(jobs, running), jobs=jobs)
            made = _collect(results, out, most=most)
        return _finish(out, work, made, start.listing)


def _already_packed(
    out: Path, work: PackPlan, *, before: Begun | None, start: Begun, again: bool
) -> bool:
    """Whether `out` is finished as planned, and nothing is to be tried again.

    `before` is the record that `out` has, if any, and `start` that of this packing.

    Raises:
        ValueError: it holds another dataset.
    """
    found, mark = None, out / WORK / PLAN
    asked = None if before is None else before.request
    is_finished = (out / MANIFEST).exists()
    if is_finished:
        manifest = parse_manifest(f"{out}/{MANIFEST}", (out / MANIFEST).read_bytes())
        found = manifest.made_by.get("plan")
        asked = asked or begun.options_of(manifest.made_by)
    elif mark.exists():
        found = mark.read_text()
    if found not in (None, work.digest) or (before and start.has_other_files(before)):
        state = "" if is_finished else "unfinished; "
        unknown = "other images, classes or options"
        what = begun.differences(asked, start.request) if asked else unknown
        since = "" if asked else ", or begun by an earlier release"
        raise ValueError(
            f"OUT = {out} holds another dataset ({state}{what}{since}): choose another OUT, or "
            "remove it to pack anew"
        )
    if not is_finished or (again and (out / LEFT_OUT).exists()):
        return False
    open_shards(out)
    return True


def _collect(results: Iterator[Made], out: Path, *, most: int) -> list[Made]:
    """All finished shards, sorted by name.

    Raises:
        ValueError: more than `most` images were left out; they are listed in `out`.
    """
    made: list[Made] = []
    lines: list[str] = []
    try:
        for one in results:
            made.append(one)
            lines += one.left_out
            if len(lines) > most:
                raise TooManyLeftOut(*lines)
    except TooManyLeftOut as error:
        files.write(out / LEFT_OUT, "".join(f"{line}\n" for line in error.args))
        shown = "; ".join(error.args[:_SHOWN])
        raise ValueError(
            f"{len(error.args)} images were left out so far ({shown}; ...; all of them in "
            f"{out / LEFT_OUT}), and --max-bad allows {most}: correct them, or raise --max-bad, "
            "and rerun with --again"
        ) from None
    return sorted(made, key=lambda one: one.shard.name)


def _finish(out: Path, work: PackPlan, made: list[Made], listing: Listing) -> int:
    left_out = [line for m in made for line in m.left_out]
    if len(left_out) == len(listing.names):
        raise ValueError(f"none of {len(left_out)} images can be decoded, such as {left_out[0]}")
    if left_out:
        files.write(out / LEFT_OUT, "\n".join(left_out) + "\n")
        print(f"{len(left_out)} images were left out: {out / LEFT_OUT}", file=sys.stderr)
    else:
        (out / LEFT_OUT).unlink(missing_ok=True)
    text = manifest_text(
        tuple(m.shard for m in made),
        classes=work.classes,
        image_size=None if work.config.keep_original else work.config.size,
        made_by={"plan": work.digest, **work.config.values},
    )
    files.write(out / MANIFEST, text)
    print(summary(listing, made, config=work.config), file=sys.stderr)
    return len(left_out)


def _results(jobs: tuple[PackJob, ...], executor: Executor | None) -> Iterator[Made]:
    if executor is None:
        yield from map(make_shard, jobs)
        return
    for future in as_completed(pool.submit(executor, make_shard, jobs)):
        yield future.result()


def _executor(workers: int, mpi: bool) -> AbstractContextManager[Executor]:
    """Runs jobs in processes here, or with `mpi` on the other ranks of mpi4py.futures.

    Raises:
        ValueError: there would be no process, or there are no other ranks, or they would not work.
    """
    check(workers >= 1, "--workers", workers, "at least 1")
    if not mpi:
        return pool.processes(workers)
    try:
        from mpi4py import MPI  # starts MPI, which only --mpi needs
        from mpi4py.futures import MPIPoolExecutor
    except (ImportError, RuntimeError) as error:
        raise ValueError(pool.no_mpi(error)) from None

    found = (os.environ[name] for name in _MPI_SIZES if name in os.environ)
    count = next(found, "1")
    if MPI.COMM_WORLD.size < 2 and count != "1":
        unlike = pool.other_mpi(MPI.Get_library_version())
        raise ValueError(f"--mpi: each of {count} ranks is alone: {unlike}")
    started = any(word.endswith("mpi4py.futures") for word in sys.orig_argv)
    if MPI.COMM_WORLD.size < 2 or not started:
        raise ValueError(
            "--mpi needs at least 2 ranks of mpi4py.futures: run "
            "`mpirun -n N python -m mpi4py.futures -m data.pack ... --mpi`"
        )
    return pool.cancelling(MPIPoolExecutor())


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m data.pack`; returns the exit status."""
    options = vars(parser().parse_args(arguments))
    config = {field.name: options.pop(field.name) for field in fields(PackConfig)}
    request = {f.name: options.pop(f.name) for f in fields(Request) if f.name in options}
    workers, mpi = options.pop("workers"), options.pop("mpi")
    try:
        with pool.interrupted_by_signals():
            executor = _executor(workers, mpi)
            wanted = Request(config=PackConfig(**config), **request)
            if options.pop("dry_run"):
                return reported(lambda: dry_run(wanted, out=options["out"], workers=workers))
            pack(wanted, executor=executor, **options)
    except KeyboardInterrupt as signal:
        print(f"packing stopped by {signal or 'Ctrl-C'}; {_CONTINUE}", file=sys.stderr)
        return TO_BE_CONTINUED
    except REPORTED as error:
        status = exit_status(error)
        print(f"packing stopped: {files.reason(error)}", file=sys.stderr)
        if status != REFUSED:
            print(_CONTINUE, file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
