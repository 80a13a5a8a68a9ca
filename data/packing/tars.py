"""Tars in WebDataset's conventions as a source of images: finding their samples and labels.

A sample is the files with one name up to the first dot: `KEY.jpg`, `KEY.png` or another image, and
`KEY.cls` (or `.label`, `.class`), `KEY.json` or `KEY.txt` for its label.
"""

import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.index import INDEX_DTYPE, Index
from data.manifest import MANIFEST, NO_CLASS, is_manifest, parse_manifest
from data.packing.labels import (
    LABEL_KEYS,
    MOST_CLASSES,
    Label,
    all_or_no_labels,
    json_label,
    text_label,
    word_label,
)
from data.packing.layout import classes_of_tars
from data.packing.listing import Listing, by_label_if_any
from data.packing.names import IMAGE_SUFFIXES, USUAL_SUFFIXES, kind, litter
from data.packing.sources import Archives, read_extent
from data.packing.splits import check_files
from data.tars import HEADER

_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One image in a tar: where its payload is; `label` is None where the tar has none."""

    name: str
    offset: int
    size: int
    label: Label | None


class Tars(Archives):
    """Existing WebDataset shards, or tars of class directories.

    Labels are in `.cls`, `.json` or `.txt`, or else the directories, if there are any.
    """

    has_names = True

    def listing(self) -> Listing:
        """As `Source.listing`."""
        check_files(self.files, pattern=self._pattern)
        names: list[str] = []
        labels: list[Label | None] = []
        members: list[list[str]] = []
        skipped = Counter[str]()
        for file in self.files:
            samples = scan_tar(file, skipped=skipped)
            names += [f"{file.name}@{s.offset}+{s.size}/{s.name}" for s in samples]
            members.append([sample.name for sample in samples])
            labels += [sample.label for sample in samples]
        listing = by_label_if_any(names, labels)
        if listing.is_numbered and (classes := self._classes_of_manifest()):
            # If the classes there have no names but their numbers, the source gives only numbers.
            are_numbers = classes == tuple(map(str, range(len(classes))))
            listing = replace(listing, classes=classes, is_numbered=are_numbers)
        elif listing.classes == (NO_CLASS,) and (found := classes_of_tars(self.files, members)):
            listing = replace(found, names=names)
        return replace(listing, skipped=skipped)

    def _classes_of_manifest(self) -> tuple[str, ...]:
        """The classes of the packed dataset that these tars are the shards of, or ()."""
        path = self.root / MANIFEST
        if not is_manifest(path):
            return ()
        manifest = parse_manifest(str(path), path.read_bytes())
        are_its = {file.name for file in self.files} <= {shard.tar for shard in manifest.shards}
        return manifest.classes if are_its else ()

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        file, _, extent = name.partition("/")[0].rpartition("@")
        offset, size = map(int, extent.split("+"))
        return read_extent(self.root / file, offset, size)


def scan_tar(path: Path, *, skipped: Counter[str] | None = None) -> list[TarSample]:
    """All images of a tar, in its order; litter and files without an image count as `skipped`.

    Raises:
        ValueError: it is compressed, damaged or truncated (common readers stop there without an
            error), has a name twice or two images in a sample, or a label that is neither a
            number nor a name.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    skipped = Counter() if skipped is None else skipped
    with path.open("rb") as file:
        for info in _members(path, file, skipped):
            if litter(info.name):
                skipped[kind(info.name)] += 1
                continue
            key, _, suffix = info.name.rpartition("/")[2].partition(".")
            group = f"{info.name.rpartition('/')[0]}/{key}"
            by_suffix = members.setdefault(group, {})
            if suffix.lower() in by_suffix:
                raise ValueError(f"{path} has {info.name} twice: every sample needs its own name")
            by_suffix[suffix.lower()] = info
        samples, texts = [], {}
        for by_suffix in members.values():
            if sample := _sample(path, file, by_suffix):
                samples.append(sample)
                if text := _only(by_suffix, "txt"):
                    texts[sample.name] = text
            else:
                skipped.update(kind(info.name) for info in by_suffix.values())
        return _with_word_labels(file, samples, texts)


def index_tar(path: Path) -> tuple[Index, list[str], bool | None]:
    """The index (n,) of a tar, the names of its images, and whether they have labels.

    Images without labels have label 0 in the index. Without images, the last value is None.

    Raises:
        ValueError: as `scan_tar`, only some images have a label, or a label is out of range.
    """
    rows, samples = [], scan_tar(path)
    known = all_or_no_labels([f"{path}: {s.name}" for s in samples], [s.label for s in samples])
    labels = known or [0] * len(samples)
    with path.open("rb") as file:
        for sample, label in zip(samples, labels, strict=True):
            if isinstance(label, str):
                raise ValueError(
                    f"{path}: {sample.name} has the label {label!r}: must be a class number; "
                    "pack tars with class names by `python -m data.pack`"
                )
            if not 0 <= label < MOST_CLASSES:
                raise ValueError(
                    f"{path}: {sample.name} has the label {label}: must be the number of a class, "
                    f"from 0 to {MOST_CLASSES - 1}"
                )
            file.seek(sample.offset)
            crc32 = zlib.crc32(file.read(sample.size))
            rows.append((sample.offset, sample.size, label, crc32))
    index = np.array(rows, dtype=INDEX_DTYPE)
    return index, [sample.name for sample in samples], known is not None if samples else None


def _members(path: Path, file: BinaryIO, skipped: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """The files in a tar; after the last one, check that the tar ends properly.

    A link to another file of the tar is yielded as a file; other links count as `skipped`.
    """
    end = 0
    found: dict[str, tarfile.TarInfo] = {}
    links: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.issparse():
                    raise ValueError(
                        f"{path}: {info.name} is stored with holes: make the tar without --sparse"
                    )
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.isreg():
                    found[posixpath.normpath(info.name)] = info
                    yield info
                elif info.islnk() or info.issym():
                    links.append(info)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a plain tar file: {error}") from None
    yield from _second_names(links, found, skipped)
    file.seek(end)
    if file.read(HEADER).strip(b"\0") or end > path.stat().st_size:
        raise ValueError(f"{path} is damaged or truncated at byte {end}")
    if any(rest.strip(b"\0") for rest in iter(partial(file.read, _PIECE), b"")):
        raise ValueError(
            f"{path} ends at byte {end}, and another tar or something else follows: where tars "
            "were joined by `cat`, give the separate tars"
        )


def _second_names(
    links: list[tarfile.TarInfo], found: dict[str, tarfile.TarInfo], skipped: Counter[str]
) -> Iterator[tarfile.TarInfo]:
    """The files that links lead to, each with the name of the link."""
    waiting = {posixpath.normpath(link.name): link for link in links}
    while waiting:
        known = {name: _target(link) for name, link in waiting.items() if _target(link) in found}
        if not known:
            break
        for name, target in known.items():
            found[name] = copy(found[target])
            found[name].name = waiting.pop(name).name
            yield found[name]
    if waiting:
        skipped["links to no file of the tar"] += len(waiting)


def _target(link: tarfile.TarInfo) -> str:
    """The path that a link leads to: a symbolic one is relative to its own directory."""
    above = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(above, link.linkname))


def _sample(path: Path, file: BinaryIO, by_suffix: dict[str, tarfile.TarInfo]) -> TarSample | None:
    def among(suffixes: tuple[str, ...]) -> list[tarfile.TarInfo]:
        return [info for name, info in by_suffix.items() if name.rpartition(".")[2] in suffixes]

    images = among(USUAL_SUFFIXES) or among(IMAGE_SUFFIXES)
    if not images:
        return None
    if len(images) > 1:
        raise ValueError(
            f"{path} has {images[0].name} and {images[1].name} in one sample (a name up to its "
            "first dot): give each image a sample, or unpack the tar and pack its directory"
        )
    return TarSample(
        name=images[0].name,
        offset=images[0].offset_data,
        size=images[0].size,
        label=_label(path, file, by_suffix),
    )


def _label(path: Path, file: BinaryIO, by_suffix: dict[str, tarfile.TarInfo]) -> Label | None:
    for suffix in ("cls", *LABEL_KEYS):
        if found := _only(by_suffix, suffix):
            return text_label(_payload(file, found), where=f"{path}: {found.name}")
    if found := _only(by_suffix, "json"):
        return json_label(_payload(file, found), where=f"{path}: {found.name}")
    return None


def _only(by_suffix: dict[str, tarfile.TarInfo], suffix: str) -> tarfile.TarInfo | None:
    """The file `KEY.SUFFIX` of a sample, or the only one like `KEY.jpg.SUFFIX`."""
    others = [info for name, info in by_suffix.items() if name.endswith(f".{suffix}")]
    return by_suffix.get(suffix) or (others[0] if len(others) == 1 else None)


def _with_word_labels(
    file: BinaryIO, samples: list[TarSample], texts: dict[str, tarfile.TarInfo]
) -> list[TarSample]:
    """Take the label of samples without one from their `.txt`, unless those are captions.

    `texts` are the `.txt` files, by the names of their samples' images.
    """
    words = {}
    for sample in samples:
        if sample.label is None and sample.name in texts:
            word = word_label(_payload(file, texts[sample.name]))
            if word is None:
                return samples
            words[sample.name] = word
    return [replace(sample, label=words.get(sample.name, sample.label)) for sample in samples]


def _payload(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    return file.read(info.size)
