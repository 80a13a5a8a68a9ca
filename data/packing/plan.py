"""The plan of a packing: a pure function of the listing and the settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import ImageColor

from data.config import check
from data.order import permutation
from data.packing.listing import Listing
from data.packing.sources import Stamp
from data.packing.splits import VAL_SHARE, Split

_FILES = "give the directory or pattern of the {} files"
_STORED = "write the images of this {} dataset to a folder, or to tars, and pack those"
_IN_ARCHIVES = (".parquet", ".tar", ".zip")
# What to do about a source without images that has files of these kinds.
_WAYS_OUT = {
    **{kind: _FILES.format(kind) for kind in _IN_ARCHIVES},
    **dict.fromkeys((".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"), "unpack it, and pack that"),
    ".arrow": "write this dataset to parquet (`to_parquet` of `datasets`) and pack that",
    ".mds": _STORED.format("MosaicML Streaming"),
    ".tfrecord": _STORED.format("TensorFlow"),
    ".bin": _STORED.format("LitData or other binary"),
    ".npy": "arrays, such as latents, are no images: pack the images that they were made of",
    ".heic": "convert them to .jpg or .png",
    "without a suffix": "names of images must end in a suffix, such as .jpg",
}


def _way_out(kind: str, source: str) -> str:
    """What to do about files of a kind in a source."""
    if kind in _IN_ARCHIVES and source.lower().endswith(_IN_ARCHIVES):
        return f"unpack it, and {_FILES.format(kind)} in it"
    return _WAYS_OUT[kind]


def _is_colour(text: str) -> bool:
    """Whether Pillow knows an opaque colour of that name."""
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to do with each image, and how to distribute them over shards."""

    #: The side of ADM's centre crop; with `keep_original`, the smaller side that larger images get.
    size: int
    #: Store images uncropped.
    keep_original: bool = False
    #: "png" or "jpg". Absent: png for crops of up to 64 pixels, otherwise jpg.
    format: str | None = None
    quality: int = 95
    #: Of the global shuffle.
    seed: int = 0
    per_shard: int = 2048
    #: Turn images as their EXIF orientation says, which ADM does not.
    exif_transpose: bool = False
    #: The colour behind transparent pixels, as Pillow names it.
    background: str = "white"
    #: Pack the images to train on, or those held out. Absent: all.
    split: Split | None = None
    #: The share of each class that is held out. Absent: `VAL_SHARE`.
    val_share: float | None = None

    def __post_init__(self) -> None:
        check(self.size >= 1, "--size", self.size, "at least 1")
        check(self.per_shard >= 1, "--per-shard", self.per_shard, "at least 1")
        check(abs(self.seed) < 2**63, "--seed", self.seed, "between -2^63 and 2^63")
        check(self.format in (None, "png", "jpg"), "--format", self.format, "png or jpg")
        check(1 <= self.quality <= 100, "--quality", self.quality, "from 1 to 100")
        names = 'a colour such as black or "#808080"'
        check(_is_colour(self.background), "--background", self.background, names)
        check(self.split in (None, "train", "val"), "--split", self.split, "train or val")
        share = self.val_share
        check(share is None or 0 < share < 1, "--val-share", share, "above 0 and below 1")
        alone = share is not None and self.split is None
        check(not alone, "--val-share", share, "absent without --split")

    @property
    def held_out(self) -> float:
        """The share of each class that is held out where there is a split."""
        return VAL_SHARE if self.val_share is None else self.val_share

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name; those added after the first release only where they are set.

        So the same request has the same digest and fingerprint in all releases.
        """
        values = asdict(self)
        if not self.exif_transpose:
            del values["exif_transpose"]
        if self.background == "white":
            del values["background"]
        if self.split is None:
            del values["split"], values["val_share"]
        else:
            values["val_share"] = self.held_out
        return values

    @property
    def suffix(self) -> str:
        """Suffix and format of the stored images, but for those that are kept unchanged."""
        return self.format or ("png" if self.size <= 64 and not self.keep_original else "jpg")


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """One shard to be made."""

    name: str
    source: str
    out: Path
    config: PackConfig
    #: How many images of the plan precede these.
    first: int
    #: Name and label of each image, in order.
    images: tuple[tuple[str, int], ...]
    #: Size and time of the files that hold the images.
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    #: The job stops when more images are left out. Absent: no limit.
    most_left_out: int | None = None


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """All jobs of a packing; `digest` changes with anything that changes the shards."""

    jobs: tuple[PackJob, ...]
    classes: tuple[str, ...]
    config: PackConfig
    digest: str


def plan(listing: Listing, *, source: str, out: Path, config: PackConfig) -> PackPlan:
    """Shuffle the images globally by the seed and distribute them over shards of equal size.

    Raises:
        ValueError: there are no images.
    """
    count = len(listing.names)
    if not count:
        kinds = [kind for kind in _WAYS_OUT if kind in listing.skipped]
        hint = f": {_way_out(kinds[0], source)}" if kinds else ""
        raise ValueError(f"SOURCE = {source} holds no images; {listing.skipped_by_kind}{hint}")
    mixed = [(listing.names[i], listing.labels[i]) for i in permutation(count, config.seed)]
    # At least 8 shards, even for small sets: epochs differ by the order of shards, too.
    per_shard = min(config.per_shard, -(-count // 8))
    jobs = tuple(
        PackJob(
            name=f"{i:05d}",
            source=source,
            out=out,
            config=config,
            first=first,
            images=tuple(mixed[first : first + per_shard]),
        )
        for i, first in enumerate(range(0, count, per_shard))
    )
    text = json.dumps([config.values, listing.classes, [job.images for job in jobs]])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PackPlan(jobs=jobs, classes=listing.classes, config=config, digest=digest)
