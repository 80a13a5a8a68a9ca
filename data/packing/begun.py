"""What a packing is asked for, and the record on disk from which another start continues it.

The record holds the request, the listing of the source, and size and time of each file. A later
start packs that same listing: files added since are not packed, files changed since are left out.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import files
from data.dataset import class_names
from data.manifest import MANIFEST, NO_CLASS
from data.packing.claim import WORK
from data.packing.class_maps import by_directories, by_prefix, map_content, relabel
from data.packing.jobs import left_out_of
from data.packing.kinds import check_alone
from data.packing.listing import Listing, renumber, warn_of_empty_classes
from data.packing.plan import PackConfig, PackJob, PackPlan
from data.packing.sources import Source, Stamp
from data.packing.splits import split_of
from data.progress import with_progress

# The file in `WORK` with the record.
BEGUN = "begun.json"
# Threads that ask for sizes and times: on a network file system each request waits.
_REQUESTS = 16
# Files that one task of a thread asks for.
_PART = 256
# Options of a request that a manifest does not record.
_NOT_IN_MANIFESTS = {"SOURCE", "--class-from", "--class-map", "--classes-of"}


@dataclass(frozen=True)
class Request:
    """What determines a dataset: a source, the settings, and where the classes are from."""

    source: str
    config: PackConfig
    #: "prefix" of the file's name or "directory"; None is what the source has.
    class_from: str | None = None
    #: Lines of NAME CLASS, or of CLASS in the names' order, in place of directories.
    class_map: Path | None = None
    #: A dataset whose class numbers to use.
    classes_of: str | Path | None = None

    def values(self) -> dict[str, Any]:
        """Each option and its value, as JSON stores them; for a file, a digest of its content.

        Raises:
            ValueError: a file cannot be read.
        """
        classes = json.dumps(class_names(self.classes_of)).encode() if self.classes_of else None
        class_map = map_content(self.class_map) if self.class_map else None
        return {
            "SOURCE": self.source if self.source == "digits" else os.path.abspath(self.source),
            **options_of(self.config.values),
            "--class-from": self.class_from,
            "--class-map": _digest(class_map),
            "--classes-of": _digest(classes),
        }

    def listing(self, source: Source) -> Listing:
        """The images that the source holds now, with the classes that the options ask for.

        Raises:
            ValueError: its images have no usable classes.
        """
        check_alone(self.source, source)
        listing = source.listing()
        if self.class_map:
            listing = relabel(listing, class_map=self.class_map, source=self.source)
        elif self.class_from and not source.has_names:
            raise ValueError(f"--class-from: the images of {self.source} have no names of files")
        elif self.class_from == "prefix":
            listing = by_prefix(listing)
        elif self.class_from == "directory":
            listing = by_directories(listing, where=self.source)
        if listing.fault:
            raise ValueError(listing.fault)
        listing.check_labels(f"SOURCE = {self.source}")
        _warn_of_missing_labels(listing, self.source)
        if self.classes_of:
            listing = renumber(listing, classes=class_names(self.classes_of))
        else:
            warn_of_empty_classes(listing.classes, listing.labels, source=self.source)
        if self.config.split:
            listing = split_of(listing, self.config.split, held_out=self.config.held_out)
        return listing


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The record: options and values, as JSON stores them, the listing, and the state of the files.

    `stamps` has size and time of each file that could be reached.
    """

    request: Mapping[str, Any]
    listing: Listing
    stamps: Mapping[str, Stamp]

    def has_other_files(self, before: "Begun") -> bool:
        """Whether a file that both records name has another size or time."""
        common = self.stamps.keys() & before.stamps.keys()
        return any(self.stamps[holder] != before.stamps[holder] for holder in common)


def stamps_of(source: Source, names: Iterable[str]) -> dict[str, Stamp]:
    """Size and time of each file that holds some of these images and can be reached."""
    holders = list(dict.fromkeys(map(source.holder, names)))
    parts = [holders[first : first + _PART] for first in range(0, len(holders), _PART)]
    with ThreadPoolExecutor(_REQUESTS) as threads:
        found = with_progress(
            threads.map(lambda part: [(each, _stamp(source, each)) for each in part], parts),
            said=lambda step: (
                f"looked at {step.done} of {len(holders)} files, {step.rate:.0f} files/s, "
                f"{step.left} left"
            ),
            total=len(holders),
            units=len,
        )
        return {holder: stamp for part in found for holder, stamp in part if stamp is not None}


def _stamp(source: Source, holder: str) -> Stamp | None:
    try:
        return source.stamp(holder)
    except OSError:
        return None  # reading it fails, too, and says why


def again(begun: Begun, *, out: Path, source: Source) -> Begun:
    """The record for `--again`; shards with missing images are no longer marked as finished.

    Raises:
        ValueError: a file that holds many images was changed: it may hold others now.
    """
    missing = left_out_of(out)
    fresh = stamps_of(source, [name for missed in missing.values() for name in missed])
    for holder, stamp in fresh.items():
        if source.files and begun.stamps.get(holder) not in (None, stamp):
            raise ValueError(f"{holder} was changed since the packing began: choose another OUT")
    begun = replace(begun, stamps={**begun.stamps, **fresh})
    # In this order: killed in between, the next start with --again finds the same images.
    save(begun, out)
    (out / MANIFEST).unlink(missing_ok=True)
    for record in missing:
        record.unlink()
    return begun


def ready_jobs(
    work: PackPlan, begun: Begun, *, source: Source, most_left_out: int
) -> tuple[PackJob, ...]:
    """The jobs of the plan, with the size and time of the files that each of them reads."""
    jobs = []
    for job in work.jobs:
        holders = dict.fromkeys(source.holder(name) for name, _ in job.images)
        stamps = {holder: begun.stamps[holder] for holder in holders if holder in begun.stamps}
        jobs.append(replace(job, stamps=stamps, most_left_out=most_left_out))
    return tuple(jobs)


def save(begun: Begun, out: Path) -> None:
    """Write the record, in full or not at all."""
    listing = {**vars(begun.listing), "skipped": dict(begun.listing.skipped)}
    files.write(out / WORK / BEGUN, json.dumps({**vars(begun), "listing": listing}))


def load(out: Path) -> Begun | None:
    """The record of the packing in `out`, or None without one; ValueError where it is damaged."""
    path = out / WORK / BEGUN
    try:
        found = json.loads(path.read_bytes())
        listing = Listing(**{**found["listing"], "classes": tuple(found["listing"]["classes"])})
        stamps = {holder: tuple(stamp) for holder, stamp in found["stamps"].items()}
        return Begun(request=found["request"], listing=listing, stamps=stamps)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove OUT = {out}, or restore it"
        ) from None


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `PackConfig`, as a manifest records them, by option: `--per-shard` etc."""
    values = {name: value for name, value in settings.items() if name != "plan"}
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """For a message: how the options of an earlier request differ from those of this one."""
    told = []
    for name in {**wanted, **before}:
        is_recorded = name in before or name not in _NOT_IN_MANIFESTS
        if is_recorded and (was := before.get(name)) != (now := wanted.get(name)):
            is_digest = name in ("--class-map", "--classes-of")
            told.append(f"another {name}" if is_digest else f"{name} was {was}, is {now}")
    return "; ".join(told) or "other images or classes"


def _warn_of_missing_labels(listing: Listing, source: str) -> None:
    """Say how many images cannot train a network with classes."""
    if NO_CLASS in listing.classes and listing.names:
        count = listing.labels.count(listing.classes.index(NO_CLASS))
        print(
            f"SOURCE = {source}: {count} of {len(listing.names)} images have no label; "
            "they cannot train a network with classes (model.num_classes); if there are classes, "
            "give --class-map or --class-from",
            file=sys.stderr,
        )


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()[:16]
