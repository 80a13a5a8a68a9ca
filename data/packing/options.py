"""The command line of `python -m data.pack`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from data import pool
from data.exits import CommandParser, place_text
from data.packing.splits import VAL_SHARE

# This many images may be left out in any case, unless `--max-bad` is 0.
FEW = 10


def parser() -> argparse.ArgumentParser:
    """All options of a packing."""
    command = CommandParser(
        prog="python -m data.pack",
        description="Pack images into shuffled shards. After an interruption, run the same command "
        "again: finished shards are kept.",
    )
    _add_images(command.add_argument)
    _add_shards(command.add_argument)
    _add_work(command.add_argument)
    return command


def _add_images(add: Callable[..., object]) -> None:
    """What the images and their classes are."""
    add(
        "source",
        metavar="SOURCE",
        type=place_text,
        help="folder, zip, tars, parquet or lmdb of images, or a pattern of files such as "
        "'DIR/*train*.tar'; a sample file (.npz), the batches of CIFAR, or digits",
    )
    add("out", metavar="OUT", type=Path, help="directory of the dataset; made if it is missing")
    add(
        "--class-from",
        choices=("prefix", "directory"),
        help="take classes from names of files, up to the first _, as guided-diffusion does, or "
        "from directories, even where a source has labels (default: what the source has)",
    )
    add(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="take classes from a file: lines of NAME CLASS, a table of such columns, or one CLASS "
        "for each image in the order of the names (default: classes of the source)",
    )
    add(
        "--classes-of",
        metavar="DIR",
        type=place_text,
        help="number the classes as this packed dataset does, a directory or URL (default: in "
        "sorted order)",
    )
    add(
        "--split",
        choices=("train", "val"),
        help="pack the images to train on, or those of each class that are held out for "
        "validation, chosen by their names (default: all images)",
    )
    share = f"the share of each class that --split holds out (default: {VAL_SHARE})"
    add("--val-share", type=float, metavar="SHARE", help=share)


def _add_shards(add: Callable[..., object]) -> None:
    """What the shards hold."""
    add("--size", type=int, default=256, help="side of the crop in pixels (default: %(default)s)")
    add(
        "--keep-original",
        action="store_true",
        help="store images uncropped, for random crops in training, and scale down those whose "
        "smaller side is above --size (default: crop)",
    )
    stored = "format of the stored images (default: png up to 64 pixels, otherwise jpg)"
    add("--format", choices=("png", "jpg"), help=stored)
    turn = "turn images as their EXIF orientation says (default: as stored, like ADM)"
    add("--exif-transpose", action="store_true", help=turn)
    behind = 'colour behind transparent pixels, such as black or "#808080" (default: %(default)s)'
    add("--background", default="white", metavar="COLOR", help=behind)
    add("--quality", type=int, default=95, help="quality of jpg, 1 to 100 (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the global shuffle (default: %(default)s)")
    add("--per-shard", type=int, default=2048, help="images in a shard (default: %(default)s)")


def _add_work(add: Callable[..., object]) -> None:
    """How the work is done; it changes nothing in the shards."""
    here = "processes on this machine (default: one for each CPU it may use, here %(default)s)"
    add("--workers", type=int, default=pool.cpus(), help=here)
    mpi = "use the ranks of `mpirun -n N python -m mpi4py.futures -m data.pack ...` as workers"
    add("--mpi", action="store_true", help=mpi)
    dry_run = "print classes, counts, sizes and the time it would take, and write nothing"
    add("--dry-run", action="store_true", help=dry_run)
    add(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of images that may be left out because they cannot be read or decoded; above 0 "
        f"it allows {FEW} images in any case (default: %(default)s)",
    )
    add(
        "--again",
        action="store_true",
        help="read the images again that were left out, as they are now (default: only those "
        "that could not be read, in a packing that is not finished)",
    )
