"""The command lines of the commands that start something."""

import argparse
from pathlib import Path

from data.exits import CommandParser, path_text
from launch.cluster import LAUNCHERS
from trainer.config import settings
from trainer.run import origin


def _add_size(p: argparse.ArgumentParser) -> None:
    """The options of every command that starts something."""
    p.add_argument("--nodes", type=int, default=1, help="number of machines (default: %(default)s)")
    gpus = "number of GPUs, and so of ranks, on each machine (default: %(default)s)"
    p.add_argument("--gpus-per-node", type=int, default=1, help=gpus)
    cluster = (
        "site settings, a file as in launch/clusters; its `launcher` is one of "
        f"{', '.join(LAUNCHERS)} (default: this machine)"
    )
    p.add_argument("--cluster", type=Path, metavar="TOML", help=cluster)
    dry_run = "print what would be submitted, and write nothing (default: submit it)"
    p.add_argument("--dry-run", action="store_true", help=dry_run)


def _add_training(p: argparse.ArgumentParser) -> None:
    settings.add_overrides(p)
    origin.add_init(p)
    ds_config = "DeepSpeed's settings, copied to the run (default: the checkout's ds_config.json)"
    p.add_argument("--ds-config", type=Path, metavar="JSON", help=ds_config)
    check = "run the preflight check before training (default: train at once)"
    p.add_argument("--check", action="store_true", help=check)


def _add_detach(p: argparse.ArgumentParser) -> None:
    detach = "start in the background, for launchers without a queue (default: in the foreground)"
    p.add_argument("--detach", action="store_true", help=detach)


def _add_at_most(p: argparse.ArgumentParser, *, what: str) -> None:
    at_most = f"number of {what} at the same time (default: %(default)s)"
    p.add_argument("--at-most", type=int, default=1, help=at_most)


def start(description: str | None) -> argparse.ArgumentParser:
    """The options that start a run."""
    p = CommandParser(prog="python -m launch", description=description)
    p.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    p.add_argument("--run", required=True, type=Path, help="the run directory")
    _add_size(p)
    _add_training(p)
    origin.add_from(p)
    _add_detach(p)
    return p


def sweep() -> argparse.ArgumentParser:
    """The options that start several runs."""
    p = CommandParser(
        prog="python -m launch sweep",
        description="Submit one Slurm array, with a run for each preset and each choice of --over.",
    )
    presets = "names in trainer/presets, or .toml files; each names its run"
    p.add_argument("presets", nargs="*", help=presets)
    rows = (
        "instead of presets the rows of a set of ablations, as of trainer.ablate, whose runs are "
        "RUNS/ROW/run; --set and --unset change the set (default: none)"
    )
    p.add_argument("--rows", metavar="SET", help=rows)
    runs = "the directory of the run directories"
    p.add_argument("--runs", required=True, type=Path, help=runs)
    over = (
        "a run for each of these values of a setting; of several settings, for each combination "
        "(default: the preset's own)"
    )
    p.add_argument("--over", action="append", default=[], metavar="'NAME = [A, B]'", help=over)
    _add_at_most(p, what="runs that train")
    _add_size(p)
    _add_training(p)
    return p


def sample() -> argparse.ArgumentParser:
    """The options of sampling that this command reads; all others are those of trainer.sample."""
    p = CommandParser(
        prog="python -m launch sample",
        usage="python -m launch sample SOURCE --out OUT [options of trainer.sample] [these]",
        description="Draw images on a cluster. The job's files are in OUT.job, beside the output; "
        "rerun the same command to resume.",
        allow_abbrev=False,
    )
    out = "as of trainer.sample: FILE.npz, or DIR/"
    p.add_argument("--out", required=True, type=path_text, help=out)
    array = (
        "a Slurm array of N jobs of this size, each with a share of the images (default: one job)"
    )
    p.add_argument("--array", type=int, metavar="N", help=array)
    _add_at_most(p, what="jobs of the array that draw")
    _add_size(p)
    _add_detach(p)
    return p
