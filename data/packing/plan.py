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
    """What to do with each image, and how to distribute them over shards.

    `size` is the side of ADM's centre crop, or with `keep_original` the smaller side beyond which
    an image is scaled down, uncropped. `format` None is png for crops of up to 64 pixels,
    otherwise jpg. `exif_transpose` turns images as their EXIF says; ADM does not. `background` is
    the colour that shows through transparent pixels, as Pillow names it. `split` packs the images
    to train on, or those that are held out: the share `val_share` of each class.
    """

    size: int
    keep_original: bool = False
    format: str | None = None
    quality: int = 95
    seed: int = 0
    per_shard: int = 2048
    exif_transpose: bool = False
    background: str = "white"
    split: Split | None = None
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
    """One shard to be made: (name, label) of its images, in order; `first` images precede them.

    `stamps` has the size and time of the files that hold the images. The job stops when it leaves
    out more than `most_left_out` images; None is any number.
    """

    name: str
    source: str
    out: Path
    config: PackConfig
    first: int
    images: tuple[tuple[str, int], ...]
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
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
        ValueError: there are no images, or one has no class.
    """
    count = len(listing.names)
    if not count:
        kinds = [kind for kind in _WAYS_OUT if kind in listing.skipped]
        hint = f": {_way_out(kinds[0], source)}" if kinds else ""
        raise ValueError(f"SOURCE = {source} holds no images; {listing.skipped_by_kind}{hint}")
    listing.check_labels(f"SOURCE = {source}")
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
