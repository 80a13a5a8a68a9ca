"""What a packing would make: `python -m data.pack --dry-run`."""

import time
from collections import Counter
from pathlib import Path

import numpy as np

from data.packing import begun
from data.packing.archives import open_source
from data.packing.begun import Request
from data.packing.jobs import encode
from data.packing.plan import PackConfig, plan
from data.packing.report import summary
from data.packing.sources import Source
from data.progress import duration
from data.transforms import UNDECODABLE

# Classes that are listed with their counts.
_LISTED = 20
# Images that are made, to know their size and how long they take.
_TRIED = 32


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
    stamps = begun.begin({}, listing=listing, source=source).stamps
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
        small += made.is_enlarged
    if not sizes:
        return "their size is not known before the source is unpacked"
    seconds = (time.monotonic() - begin) / len(chosen) * len(names) / workers
    # In a tar each image has a label, and both have a header and are filled up to 512 bytes.
    stored = (np.mean(sizes) + 3.5 * 512) * len(names)
    tried = f"of {len(chosen)} that were tried"
    damaged = f"; {bad} {tried} cannot be decoded" if bad else ""
    enlarged = f"; {small} {tried} are smaller than {config.size} pixels" if small else ""
    return (
        f"about {stored / 2**20:.1f} MiB, about {duration(seconds)} with {workers} "
        f"process{'es' if workers > 1 else ''}{damaged}{enlarged}"
    )
