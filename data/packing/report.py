"""What a packing tells the user: progress, warnings, and in the end what was packed."""

import sys
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from data import progress
from data.manifest import NO_CLASS
from data.packing.jobs import Made
from data.packing.listing import Listing
from data.packing.plan import PackConfig, PackJob

# Classes, and huge images, that the closing line names.
_LISTED = 5


def warn_of_missing_labels(listing: Listing, source: str) -> None:
    """Say how many images cannot train a network with classes."""
    if NO_CLASS in listing.classes and listing.names:
        count = listing.labels.count(listing.classes.index(NO_CLASS))
        print(
            f"SOURCE = {source}: {count} of {len(listing.names)} images have no label; "
            "they cannot train a network with classes (model.num_classes); if there are classes, "
            "give --class-map or --class-from",
            file=sys.stderr,
        )


def summary(listing: Listing, made: Sequence[Made], *, config: PackConfig) -> str:
    """What was packed and what was not, in one line."""
    left_out = sum(len(one.left_out) for one in made)
    transparent, turned = sum(m.transparent for m in made), sum(m.turned for m in made)
    small, dim = sum(m.enlarged for m in made), sum(m.dim for m in made)
    huge = [name for m in made for name in m.huge]
    names = [name or "(none)" for name in listing.classes]
    shown = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    alpha = f", {transparent} with transparency (now on {config.background})" if transparent else ""
    dark = f", {dim} of 16 bits with values below 4,096 (nearly black: scale them to 65,535 first)"
    how = "applied" if config.exif_transpose else "ignored as in ADM; --exif-transpose applies it"
    exif = f", {turned} with an EXIF orientation ({how})" if turned else ""
    enlarged = f", {small} smaller than {config.size} pixels (enlarged)" if small else ""
    of = f"{Image.MAX_IMAGE_PIXELS or 0:,} pixels ({', '.join(huge[:_LISTED])}"
    large = f", {len(huge)} of more than {of}{', ...' * (len(huge) > _LISTED)})" if huge else ""
    return (
        f"{len(listing.names) - left_out} images in {len(names)} "
        f"class{'es' if len(names) > 1 else ''} ({shown}), {left_out} left out, "
        f"{listing.skipped_by_kind}{alpha}{dark if dim else ''}{exif}{enlarged}{large}"
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
