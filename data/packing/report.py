"""What a packing prints: with `--dry-run` what it would make, progress, and what was packed."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data import progress
from data.packing.begun import Request, stamps_of
from data.packing.jobs import Made, encode
from data.packing.kinds import open_source
from data.packing.listing import Listing
from data.packing.names import first_of
from data.packing.plan import PackConfig, PackJob, plan
from data.packing.sources import Source
from data.transforms import UNDECODABLE

# Classes that a dry run lists with their counts.
_LISTED = 20
# Images that a dry run encodes, to estimate sizes and times.
_TRIED = 32


def summary(listing: Listing, made: Sequence[Made], *, config: PackConfig) -> str:
    """What was packed and what was not, in one line."""
    left_out = sum(len(one.left_out) for one in made)
    huge = [name for one in made for name in one.huge]
    dark = "values below 4,096 (nearly black: scale them to 65,535 first)"
    exif = "applied" if config.exif_transpose else "ignored as in ADM; --exif-transpose applies it"
    counts = {
        f"with transparency (now on {config.background})": sum(one.transparent for one in made),
        f"of 16 bits with {dark}": sum(one.dim for one in made),
        f"with an EXIF orientation ({exif})": sum(one.turned for one in made),
        f"smaller than {config.size} pixels (enlarged)": sum(one.enlarged for one in made),
        "of several pictures or pages (the first is packed)": sum(one.several for one in made),
        f"of more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels ({first_of(huge)})": len(huge),
    }
    names = [name or "(none)" for name in listing.classes]
    return (
        f"{len(listing.names) - left_out} images in {len(names)} "
        f"class{'es' if len(names) > 1 else ''} ({first_of(names)}), {left_out} left out, "
        f"{listing.skipped_by_kind}"
        f"{''.join(f', {count} {kind}' for kind, count in counts.items() if count)}"
    )


def with_progress(made: Iterable[Made], *, jobs: tuple[PackJob, ...]) -> Iterator[Made]:
    """Pass finished shards on, and print at most once a second how far they have come."""
    images = sum(len(job.images) for job in jobs)
    return progress.with_progress(
        made,
        total=images,
        units=lambda one: one.shard.samples + len(one.left_out),
        said=lambda step: (
            f"packed {step.items} of {len(jobs)} shards, {step.done} of {images} images, "
            f"{step.rate:.0f} images/s, {step.left} left"
        ),
        closing=True,
    )


def dry_run(wanted: Request, *, out: Path, workers: int) -> int:
    """Print what the packing would hold, and how large and how long it would be; writes nothing.

    Raises:
        ValueError, OSError: the packing would be refused.
    """
    source = open_source(wanted.source, staging=out / "none")
    listing = wanted.listing(source)
    work = plan(listing, source=wanted.source, out=out, config=wanted.config)
    print(summary(listing, [], config=wanted.config))
    counts = Counter(listing.labels)
    for label, name in list(enumerate(listing.classes))[:_LISTED]:
        print(f"  {name or '(none)'}: {counts[label]}")
    if len(listing.classes) > _LISTED:
        least, most = min(counts.values()), max(counts.values())
        print(f"  ... and {len(listing.classes) - _LISTED} more; {least} to {most} images each")
    stamps = stamps_of(source, listing.names)
    print(f"{sum(size for size, _ in stamps.values()) / 2**20:.1f} MiB in {len(stamps)} files")
    print(f"{len(work.jobs)} shards, {_estimate(source, listing.names, wanted.config, workers)}")
    return 0


def _estimate(source: Source, names: list[str], config: PackConfig, workers: int) -> str:
    """How large the shards would be and how long they would take, from some images."""
    chosen = np.linspace(0, len(names) - 1, min(_TRIED, len(names)), dtype=int)
    begin, sizes, bad, small = time.monotonic(), [], 0, 0
    for i in chosen:
        try:
            made = encode(source.read(names[i]), config=config)
        except UNDECODABLE:
            bad += 1
            continue
        sizes.append(len(made.content))
        small += "enlarged" in made.traits
    if not sizes:
        return "their size is not known before the source is unpacked"
    seconds = (time.monotonic() - begin) / len(chosen) * len(names) / workers
    # In a tar, each takes 3.5 x 512 bytes more: two headers, the label, half a block of padding.
    stored = (np.mean(sizes) + 3.5 * 512) * len(names)
    tried = f"of {len(chosen)} that were tried"
    damaged = f"; {bad} {tried} cannot be decoded" if bad else ""
    enlarged = f"; {small} {tried} are smaller than {config.size} pixels" if small else ""
    return (
        f"about {stored / 2**20:.1f} MiB, about {progress.duration(seconds)} with {workers} "
        f"process{'es' if workers > 1 else ''}{damaged}{enlarged}"
    )
