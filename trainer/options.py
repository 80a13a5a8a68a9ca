"""The command line of `python -m trainer.train`, and what all commands of ranks share."""

import argparse
from pathlib import Path

from data.exits import CommandParser
from trainer.config import ds_config as ds_configs
from trainer.config import settings
from trainer.run import origin

_ABOUT = """Train a preset, or resume the run that is there.

Started by torchrun, mpirun, srun, `deepspeed` or alone. Ctrl-C or TERM saves and leaves with
status 75 (under a bare mpirun or `deepspeed`, `python -m launch stop RUN` does); the same command
resumes. A finished run says so and leaves with status 0.
"""

#: Seconds after which a rank that is lost ends the job.
PATIENCE = 600.0
# Shorter, a busy machine reports too late; longer, torch's timers would overflow. In seconds.
_PATIENCE = (10, 10**6)


def count(text: str) -> int:
    """The value of an option that counts something, at least 0."""
    if (found := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{found}: must be at least 0")
    return found


def seconds(text: str) -> float:
    """The value of `--patience`: a length of time that a watchdog can keep."""
    least, most = _PATIENCE
    if not least <= (found := float(text)) <= most:
        raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most:,} seconds")
    return found


def add_ranks(p: argparse.ArgumentParser, *, work: str) -> None:
    """The options by which a job states what its ranks must find; without GPUs they `work` so."""
    ranks = "refuse to start with another number of ranks (default: any number)"
    p.add_argument("--ranks", type=int, help=ranks)
    gpus = f"refuse a machine that shows fewer GPUs; 0: {work} on CPUs (default: what there is)"
    p.add_argument("--gpus", type=count, help=gpus)
    add_local_rank(p)


def add_local_rank(p: argparse.ArgumentParser) -> None:
    """The option that `deepspeed` passes to every rank; nothing reads it."""
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_patience(p: argparse.ArgumentParser, *, ends: str) -> None:
    """The option that says for how long a rank may be what `ends` the job."""
    patience = f"end the job when a rank is {ends} for so long (default: %(default)s)"
    p.add_argument("--patience", type=seconds, default=PATIENCE, metavar="SECONDS", help=patience)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.train", description=_ABOUT)
    p.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    p.add_argument("--run", required=True, type=Path, help="the run directory")
    settings.add_overrides(p)
    ds_config = f"DeepSpeed's settings (default: {ds_configs.DEFAULT})"
    p.add_argument("--ds-config", help=ds_config)
    origin.add_init(p)
    origin.add_from(p)
    add_ranks(p, work="train")
    profile = "profile so many steps on the main rank, into RUN/profile/ (default: none)"
    p.add_argument("--profile", type=count, default=0, metavar="STEPS", help=profile)
    add_patience(p, ends="lost or hung")
    return p
