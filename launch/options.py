"""The command lines of the commands that start something."""

import argparse
from pathlib import Path

from data.exits import CommandParser, path_text
from launch.cluster import LAUNCHERS
from trainer.config import settings
from trainer.run import origin


def _add_size(parser: argparse.ArgumentParser) -> None:
    """The options of every command that starts something."""
    parser.add_argument(
        "--nodes", type=int, default=1, help="number of machines (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=1,
        help="number of GPUs, and so of ranks, on each machine (default: %(default)s)",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="TOML",
        help="site settings, a file as in launch/clusters; its `launcher` is one of "
        f"{', '.join(LAUNCHERS)} (default: this machine)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be submitted, and write nothing (default: submit it)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    settings.add_overrides(parser)
    origin.add_init(parser)
    parser.add_argument(
        "--ds-config",
        type=Path,
        metavar="JSON",
        help="DeepSpeed's settings, copied to the run (default: the checkout's ds_config.json)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run the preflight check before training (default: train at once)",
    )


def _add_detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detach",
        action="store_true",
        help="start in the background, for launchers without a queue (default: in the foreground)",
    )


def _add_at_most(parser: argparse.ArgumentParser, *, what: str) -> None:
    parser.add_argument(
        "--at-most",
        type=int,
        default=1,
        help=f"number of {what} at the same time (default: %(default)s)",
    )


def start(description: str | None) -> argparse.ArgumentParser:
    """The options that start a run."""
    parser = CommandParser(prog="python -m launch", description=description)
    parser.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    _add_size(parser)
    _add_training(parser)
    origin.add_from(parser)
    _add_detach(parser)
    return parser


def sweep() -> argparse.ArgumentParser:
    """The options that start several runs."""
    parser = CommandParser(
        prog="python -m launch sweep",
        description="Submit one Slurm array, with a run for each preset and each choice of --over.",
    )
    parser.add_argument(
        "presets", nargs="*", help="names in trainer/presets, or .toml files; each names its run"
    )
    parser.add_argument(
        "--rows",
        metavar="SET",
        help="instead of presets the rows of a set of ablations, as of trainer.ablate, whose runs "
        "are RUNS/ROW/run; --set and --unset change the set (default: none)",
    )
    parser.add_argument(
        "--runs", required=True, type=Path, help="the directory of the run directories"
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="'NAME = [A, B]'",
        help="a run for each of these values of a setting; of several settings, for each "
        "combination (default: the preset's own)",
    )
    _add_at_most(parser, what="runs that train")
    _add_size(parser)
    _add_training(parser)
    return parser


def sample() -> argparse.ArgumentParser:
    """The options of sampling that this command reads; all others are those of trainer.sample."""
    parser = CommandParser(
        prog="python -m launch sample",
        usage="python -m launch sample SOURCE --out OUT [options of trainer.sample] [these]",
        description="Draw images on a cluster. The job's files are in OUT.job, beside the output; "
        "rerun the same command to resume.",
        allow_abbrev=False,
    )
    out = "as of trainer.sample: FILE.npz, or DIR/"
    parser.add_argument("--out", required=True, type=path_text, help=out)
    parser.add_argument(
        "--array",
        type=int,
        metavar="N",
        help="a Slurm array of N jobs of this size, each with a share of the images (default: "
        "one job)",
    )
    _add_at_most(parser, what="jobs of the array that draw")
    _add_size(parser)
    _add_detach(parser)
    return parser
