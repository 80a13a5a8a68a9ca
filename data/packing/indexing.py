"""Datasets of shards that exist already: an index and a manifest for the tars of others, or one
manifest over the shards of several datasets.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import files
from data.config import is_local, shown
from data.dataset import Shards, open_shards, write_index
from data.index import Index
from data.manifest import MANIFEST, NO_CLASS, check_name, manifest_text
from data.packing.layout import classes_of_tars
from data.packing.listing import warn_of_empty_classes
from data.packing.names import USUAL_SUFFIXES
from data.packing.splits import splits_among
from data.packing.tars import index_tar
from data.progress import with_progress

# What making a link fails with where no file can have one.
_WITHOUT_LINKS = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)


def index_directory(root: Path, *, out: Path | None = None) -> Shards:
    """Make index and manifest for the tars in a directory; numbers become classes "0" to "max".

    Without labels, the classes are the directories in the tars, if there are several; otherwise
    there is one class, which has no name. Index and manifest lie beside the tars, or in `out`
    beside links to them.

    Raises:
        ValueError: there is a manifest already, there are no tars or no images, one is damaged, its
            name is not one that a shard may have, or some have labels and others none.
    """
    tars, home = sorted(root.glob("*.tar")), out or root
    if not tars or (home / MANIFEST).exists():
        what = f"{home} has a manifest already" if tars else f"{root} holds no .tar files"
        raise ValueError(f"{what}: there is nothing to index")
    if found := splits_among(tar.name for tar in tars):
        raise ValueError(
            f"{root} holds the splits {', '.join(found)}: move each to a directory of its own"
        )
    for tar in tars:
        try:
            check_name(tar.stem)
        except ValueError as error:
            raise ValueError(f"{tar}: {error}; rename it") from None
    indexes, classes = _indexes(tars)
    if not any(map(len, indexes)):
        raise ValueError(
            f"{root}: no image in {len(tars)} tars: images have names that end with "
            f".{', .'.join(USUAL_SUFFIXES)}"
        )
    labels = {label for index in indexes for label in np.unique(index["label"]).tolist()}
    warn_of_empty_classes(classes, labels, source=root)
    with _new(out) if out else nullcontext():
        if out:
            for tar in tars:
                _link(tar, out / tar.name)
        pairs = zip(tars, indexes, strict=True)
        shards = [write_index(home / tar.name, index) for tar, index in pairs]
        made_by = {"index": "tars made by others"}
        text = manifest_text(tuple(shards), classes=classes, image_size=None, made_by=made_by)
        files.write(home / MANIFEST, text)
    return open_shards(home)


def merge(out: Path, roots: list[str]) -> Shards:
    """One dataset of the shards of several, which must have the same classes and image size.

    The shards are linked, not copied; those of dataset i have names that begin with `i-`.

    Raises:
        ValueError: classes or sizes differ, a dataset is given twice, or `out` is not empty.
    """
    for root in roots:
        if not is_local(root):
            raise ValueError(f"{shown(root)} is no directory: copy the dataset to this machine")
    parts = [open_shards(root) for root in roots]
    first = parts[0]
    for part in parts[1:]:
        if part.classes != first.classes:
            raise ValueError(
                f"{part.where} has other classes than {first.where}: pack it with --classes-of "
                f"{first.where}"
            )
        if part.image_size != first.image_size:
            raise ValueError(
                f"{part.where} has images of {part.image_size or 'their own sizes'}, "
                f"{first.where} of {first.image_size or 'their own sizes'}: pack one of them again"
            )
    if len({part.fingerprint for part in parts}) < len(parts):
        raise ValueError("a dataset is given twice: every image would count twice")
    renamed = [
        (Path(part.root), shard, replace(shard, name=f"{number}-{shard.name}"))
        for number, part in enumerate(parts)
        for shard in part.shards
    ]
    shards = tuple(new for _, _, new in renamed)
    text = manifest_text(
        shards, classes=first.classes, image_size=first.image_size, made_by=_merged(parts)
    )
    with _new(out):
        for home, old, new in renamed:
            _link(home / old.tar, out / new.tar)
            _link(home / old.index, out / new.index)
        files.write(out / MANIFEST, text)
    return open_shards(out)


def _merged(parts: list[Shards]) -> dict[str, Any]:
    """`made_by` of a merged dataset; if originals were kept, with the least size of all of them."""
    sides = [part.kept_side for part in parts if part.kept_side is not None]
    kept = {"keep_original": True, "size": min(sides)} if sides else {}
    return {"merge": [part.fingerprint for part in parts], **kept}


def _indexes(tars: list[Path]) -> tuple[list[Index], tuple[str, ...]]:
    """The index of each tar, and the classes of all of them."""
    indexes, members, most = [], [], 0
    # The first tar with labels and the first without.
    kinds: dict[bool, Path] = {}
    found = with_progress(
        map(index_tar, tars),
        total=len(tars),
        said=lambda step: f"indexed {step.done} of {len(tars)} tars, {step.left} left",
    )
    for tar, (index, names, labelled) in zip(tars, found, strict=True):
        if labelled is not None:
            kinds.setdefault(labelled, tar)
        if len(kinds) == 2:
            raise ValueError(f"{kinds[False]} has no labels, and {kinds[True]} has some")
        most = max(most, int(index["label"].max(initial=0)))
        indexes.append(index)
        members.append(names)
    if False not in kinds:
        return indexes, tuple(str(i) for i in range(most + 1))
    listing = classes_of_tars(tars, members)
    if listing is None:
        return indexes, (NO_CLASS,)
    if listing.fault:
        raise ValueError(listing.fault)
    labels = iter(listing.labels)
    for index in indexes:
        index["label"] = [next(labels) for _ in index]
    return indexes, listing.classes


@contextmanager
def _new(out: Path) -> Iterator[None]:
    """Make a directory; ValueError if it exists and is not empty.

    After an error in the `with` block it is emptied, so that the command can be run again.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"OUT = {out} is not empty: choose another OUT")
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            path.unlink()
        raise


def _link(file: Path, link: Path) -> None:
    """Make a hard link to a file, or where that fails a symbolic one.

    Raises:
        ValueError: the file system, such as exFAT or a mounted object store, has neither.
    """
    try:
        os.link(file.resolve(), link)
    except OSError:  # another file system, a read-only one, or one of another owner
        try:
            link.symlink_to(file.resolve())
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            raise ValueError(
                f"OUT = {link.parent} is on a file system without links ({error.strerror}): choose "
                "an OUT on another"
            ) from None
