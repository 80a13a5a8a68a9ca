"""Sources that are datasets already: WebDataset tars, LSUN's lmdb; and which kind a path is."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from data.labels import Label
from data.manifest import MANIFEST, NO_CLASS, is_manifest, parse_manifest
from data.packing.arrays import Cifar, SampleFile, cifar_files
from data.packing.layout import class_directories
from data.packing.listing import Listing, by_directory_name, by_label_if_any
from data.packing.names import is_image, litter
from data.packing.parquet import Parquet
from data.packing.sources import Archives, Digits, Folder, OneFile, Source, Zip, read_extent
from data.packing.splits import check_files
from data.tars import scan_tar


def open_source(text: str, *, staging: Path) -> Source:
    """The source at a path of the command line; parquet is unpacked into `staging`.

    Raises:
        ValueError: there is nothing of the known kinds.
    """
    path = Path(text)
    if text == "digits":
        return Digits()
    if path.suffix.lower() == ".zip" and path.is_file():
        return Zip(path)
    if (path / "data.mdb").is_file():
        return Lmdb(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return SampleFile(path, staging=staging)
    if batches := cifar_files(path):
        return Cifar(batches, staging=staging)
    for suffix, kind in ((".parquet", Parquet), (".tar", Tars)):
        found, pattern = _files(path, suffix)
        if found:
            return kind(found, pattern=pattern, staging=staging)
    if path.is_dir():
        return Folder(path)
    raise ValueError(
        f"SOURCE = {text}: must be a folder, zip, tar, parquet or lmdb of images, an .npz "
        "of samples, the files of CIFAR, or `digits`"
    )


def check_alone(text: str, source: Source) -> None:
    """Raise ValueError where images or archives lie beside the files of a source in a directory."""
    root = Path(text)
    if not source.files or not root.is_dir():
        return
    known = {file.relative_to(root).as_posix() for file in source.files}
    for name in Folder(root).paths():
        if name not in known and not litter(name) and (is_image(name) or _is_archive(root / name)):
            raise ValueError(
                f"SOURCE = {text} holds {source.files[0].name} and {name}: move one of them to "
                "another directory, or give a file or a pattern of files"
            )


def _is_archive(file: Path) -> bool:
    suffix = file.suffix.lower()
    return suffix in (".tar", ".parquet") and not _is_metadata(file) and file.is_file()


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
            # Numbers that others wrote mean no names, so those are labels.
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


def _files(path: Path, suffix: str) -> tuple[list[Path], str]:
    """The files with a suffix that a path means, and the pattern of their names.

    It is one of them, their directory, or a pattern such as `DIR/*train*.tar`. In a directory, a
    file beside a tar of its name is the metadata that img2dataset writes.
    """
    if path.is_dir():
        found, pattern = (f for f in path.iterdir() if not _is_metadata(f)), "*"
    elif path.suffix.lower() != suffix:
        return [], ""
    elif path.is_file():
        return [path], path.name
    else:
        found, pattern = path.parent.glob(path.name), path.name
    wanted = (f for f in found if f.suffix.lower() == suffix and not litter(f.name))
    return sorted(f for f in wanted if f.is_file()), pattern


def _is_metadata(file: Path) -> bool:
    return file.suffix.lower() == ".parquet" and file.with_suffix(".tar").is_file()


# Directories that are named after their shard, which says nothing of classes.
_SHARD = re.compile(r"(.*(shard|part|chunk).*)?[\d_-]+", re.IGNORECASE)
_NUMBER = re.compile(r"(.*?)(\d+)")


def classes_of_tars(tars: Sequence[Path], members: list[list[str]]) -> Listing | None:
    """The classes of tars without labels, from the names of the images in each; None without any.

    They are several directories within the tars, unless these are named after shards; or, where
    there are no directories, the tars themselves, if they are not numbered like shards.
    """
    names = [name.removeprefix("./") for each in members for name in each]
    classes, fault = class_directories(names, directories=(), where=str(tars[0].parent))
    found, stems = {*classes}, [tar.stem for tar in tars]
    if found == {NO_CLASS} and _are_classes(stems, members):
        named = [tar.stem for tar, each in zip(tars, members, strict=True) for _ in each]
        return by_directory_name(names, named)
    are_shards = found <= {*stems} and all(_SHARD.fullmatch(name) for name in found)
    if len(found) < 2 or NO_CLASS in found or are_shards:
        return None
    return replace(by_directory_name(names, classes), fault=fault)


def _are_classes(stems: list[str], members: list[list[str]]) -> bool:
    """Whether tars are a class each, as those of ILSVRC: n01440764.tar and so on."""
    if len(stems) < 2 or all(_SHARD.fullmatch(stem) for stem in stems):
        return False  # the names of img2dataset begin with the shard's number, too
    if all(
        name.startswith(stem) for stem, each in zip(stems, members, strict=True) for name in each
    ):
        return True
    parts = [_NUMBER.fullmatch(stem) for stem in stems]
    return not any(_SHARD.fullmatch(stem) for stem in stems) and not any(parts)


class Lmdb(OneFile):
    """LSUN's layout: a database of one category, image files by key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "data.mdb")

    def listing(self) -> Listing:
        """As `Source.listing`."""
        with _database(self._path.parent).begin() as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
        return Listing(names=keys, labels=[0] * len(keys), classes=(self._path.parent.name,))

    def read(self, name: str) -> bytes:
        """As `Source.read`."""
        with _database(self._path.parent).begin() as transaction:
            found = transaction.get(name.encode("latin-1"))
        if found is None:
            raise ValueError("it is no longer there")
        return bytes(found)


@cache
def _database(path: Path) -> Any:
    """A database, opened once in a process: lmdb allows no more."""
    import lmdb  # optional: only this source needs it

    return lmdb.open(str(path), readonly=True, lock=False, readahead=False)
