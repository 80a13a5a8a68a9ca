"""Verify, show, index, merge or export packed datasets.

python -m data.shards verify DIR [--full]      compare a dataset with its manifest
python -m data.shards info DIR [--sheet PNG]   print counts, classes and sizes
python -m data.shards index DIR [--out OUT]    make index and manifest for existing tars
python -m data.shards export DIR OUT.npz       write a sample file of all images
python -m data.shards merge OUT DIR DIR ...    one dataset of the shards of several
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import descriptors, files
from data.config import FetchConfig, shown
from data.dataset import Shards, open_shards, unlisted, verify
from data.exits import REFUSED, TO_BE_CONTINUED, CommandParser, place_text, reported
from data.export import export
from data.order import packed_place
from data.packing.indexing import index_directory, merge
from data.pool import interrupted_by_signals
from data.reader import Reader
from data.tars import HEADER
from data.transforms import UNDECODABLE, Pixels, decode

# Thumbnails on a contact sheet.
_THUMBNAILS = 64
# Pixels of a thumbnail's longer side.
_TILE = 128
# Classes that `info` lists by name.
_LISTED = 20


def _verify(root: str, *, full: bool) -> int:
    faults = verify(root, full=full)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return REFUSED
    print(f"{shown(root)}: all shards match the manifest")
    _tell_unlisted(open_shards(root, check_files=False))
    return 0


def _tell_unlisted(shards: Shards) -> None:
    if said := unlisted(shards):
        print(said)


def _class(number: int, name: str) -> str:
    """A class as `--classes` of a sampler takes it: its number, and its name if it has one."""
    return (f"{number} {name}" if name != str(number) else name) if name else "(none)"


def _show(root: str | Path, *, sheet: Path | None = None, classes: bool = False) -> int:
    """Print what a dataset contains; draw thumbnails of some of its images."""
    kind = _picture_format(sheet) if sheet else ""
    shards = open_shards(root)
    counts = np.zeros(len(shards.classes), dtype=np.int64)
    reader = Reader(shards.root, config=FetchConfig())
    for i in range(len(shards.shards)):
        counts += np.bincount(shards.read_index(i, reader)["label"], minlength=len(counts))
    total = sum(shard.bytes for shard in shards.shards)
    size = f"{shards.image_size} x {shards.image_size}" if shards.image_size else "of own sizes"
    print(f"{shards.count} images {size}, {len(shards.shards)} shards, {total / 2**20:.1f} MiB")
    print(f"{len(counts)} classes with {counts.min()} to {counts.max()} images")
    listed = len(counts) if classes else _LISTED
    for number, name in enumerate(shards.classes[:listed]):
        print(f"  {_class(number, name)}: {counts[number]}")
    if len(counts) > listed:
        print(f"  ... and {len(counts) - listed} more (--classes lists all)")
    print(f"fingerprint {shards.fingerprint}")
    _tell_unlisted(shards)
    if sheet:
        files.make_parent(sheet, option="--sheet")
        picture = _contact_sheet(_stored(shards, _THUMBNAILS, reader))
        with files.whole(sheet) as file:
            picture.save(file, format=kind)
        print(f"thumbnails: {sheet}")
    return 0


def _picture_format(file: Path) -> str:
    """The format of a picture as its name says; ValueError where that can be written in none."""
    found = Image.registered_extensions().get(file.suffix.lower(), "")
    if found not in Image.SAVE:
        raise ValueError(f"--sheet = {str(file)!r}: must end as a picture does, such as in .png")
    return found


def _stored(shards: Shards, count: int, reader: Reader) -> Iterator[Pixels]:
    """Images at equal distances in packing order.

    Raises:
        ValueError: one cannot be decoded.
    """
    images = np.linspace(0, shards.count - 1, min(count, shards.count), dtype=int)
    for shard, row in zip(*packed_place(np.cumsum(shards.sizes), images), strict=True):
        index, tar = shards.read_index(shard, reader), shards.shards[shard].tar
        offset, size, _, _ = index[row].item()
        content = reader.read(tar, first=offset, size=size)
        try:
            pixels = decode(content)
        except UNDECODABLE as error:
            key = shards.key(shard, row, first=offset - HEADER, reader=reader)
            raise ValueError(f"{shards.where}/{tar}: {key} cannot be decoded: {error}") from None
        yield pixels
    reader.close()


def _contact_sheet(stored: Iterable[Pixels]) -> Image.Image:
    """Draw images as thumbnails of at most `_TILE` pixels, in rows of a square sheet."""
    thumbnails = []
    for pixels in stored:
        image = Image.fromarray(pixels)
        scale = _TILE / max(image.size)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        # Small images are enlarged with sharp pixels, large ones scaled down smoothly.
        filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        thumbnails.append(image.resize(size, filter_))
    columns = math.ceil(math.sqrt(len(thumbnails)))
    rows = math.ceil(len(thumbnails) / max(columns, 1))
    sheet = Image.new("RGB", (max(columns, 1) * _TILE, max(rows, 1) * _TILE))
    for i, thumbnail in enumerate(thumbnails):
        sheet.paste(thumbnail, (i % columns * _TILE, i // columns * _TILE))
    return sheet


def _index(root: Path, *, out: Path | None) -> int:
    return _show(index_directory(root, out=out).root)


def _merge(out: Path, roots: list[str]) -> int:
    return _show(merge(out, roots).root)


def _export(root: str, out: Path) -> int:
    print(f"{export(root, out).count} images: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m data.shards",
        description="Verify, show, index, merge or export packed datasets.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], help_text: str) -> Callable[..., object]:
        command = commands.add_parser(name, help=help_text)
        command.set_defaults(run=run)
        return command.add_argument

    anywhere = "directory or URL of the dataset"
    option = add("verify", _verify, "compare a dataset with its manifest")
    option("root", metavar="DIR", type=place_text, help=anywhere)
    full = "compare checksums of tars too, which reads every byte (default: their sizes)"
    option("--full", action="store_true", help=full)
    option = add("info", _show, "print counts, classes and sizes")
    option("root", metavar="DIR", type=place_text, help=anywhere)
    all_classes = f"list all classes (default: the first {_LISTED})"
    option("--classes", action="store_true", help=all_classes)
    thumbnails = f"draw up to {_THUMBNAILS} thumbnails into this file (default: none)"
    option("--sheet", metavar="PNG", type=Path, help=thumbnails)
    option = add("index", _index, "make index and manifest for existing tars")
    option("root", metavar="DIR", type=Path, help="directory of the tars")
    out = (
        "directory for index, manifest and links to the tars, where DIR cannot be written "
        "(default: DIR)"
    )
    option("--out", metavar="OUT", type=Path, help=out)
    option = add("export", _export, "write a sample file of all images")
    option("root", metavar="DIR", type=place_text, help=anywhere)
    option("out", metavar="OUT.npz", type=Path, help="the file to be made")
    option = add("merge", _merge, "one dataset of the shards of several, by links")
    option("out", metavar="OUT", type=Path, help="directory to be made")
    option("roots", metavar="DIR", nargs="+", type=place_text, help="directories of datasets")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m data.shards`; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    descriptors.raise_limit()
    run = options.pop("run")
    return reported(lambda: _stoppable(run, options))


def _stoppable(run: Callable[..., int], options: dict[str, Any]) -> int:
    """The exit status of a command, also of one that a signal stops."""
    try:
        with interrupted_by_signals():
            return run(**options)
    except KeyboardInterrupt as signal:
        print(f"stopped by {signal or 'Ctrl-C'}; run the same command again", file=sys.stderr)
        return TO_BE_CONTINUED


if __name__ == "__main__":
    sys.exit(main())
