"""The plan of a packing, made before anything is written and by itself: no files, no processes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data.order import permutation
from data.sources import Listing


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
class Plan:
    """All jobs of a packing; `digest` changes with anything that changes the shards."""

    jobs: tuple[Job, ...]
    classes: tuple[str, ...]
    config: PackConfig
    digest: str


def plan(listing: Listing, *, source: str, out: Path, config: PackConfig) -> Plan:
    """Shuffle the images globally by the seed and deal them to shards of equal size.

    Raises:
        ValueError: there are no images, or one has no class.
    """
    count = len(listing.names)
    if not count:
        raise ValueError(f"SOURCE = {source} holds no images")
    if (least := min(listing.labels)) < 0:
        name = listing.names[listing.labels.index(least)]
        raise ValueError(f"SOURCE = {source}: {name} has the label {least}: it has no class")
    mixed = [(listing.names[i], listing.labels[i]) for i in permutation(count, config.seed)]
    # A few shards at least, even for small sets: epochs differ by the order of shards, too.
    per_shard = min(config.per_shard, -(-count // 8))
    jobs = tuple(
        Job(
            name=f"{i:05d}",
            source=source,
            out=str(out),
            config=config,
            first=first,
            images=tuple(mixed[first : first + per_shard]),
        )
        for i, first in enumerate(range(0, count, per_shard))
    )
    text = json.dumps([asdict(config), listing.classes, [job.images for job in jobs]])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Plan(jobs=jobs, classes=listing.classes, config=config, digest=digest)
