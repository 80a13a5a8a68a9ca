"""What a start of a run begins from, by its command line: `--init`, `--init-skip` and `--from`.

A login node reads these options too, and checks what they name. No torch here.
"""

import argparse
import json
import time
from pathlib import Path

from data import files
from trainer.run.runstate import committed


def add_init(parser: argparse.ArgumentParser) -> None:
    """The options that name the weights that a new run starts from."""
    parser.add_argument(
        "--init",
        type=Path,
        help="start from the weights of a run, a checkpoint, or a .safetensors or .pt file "
        "(default: from the seed)",
    )
    parser.add_argument(
        "--init-skip",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts of the weights that are not taken, such as label_emb: the network's start from "
        "the seed (default: none)",
    )


def add_from(parser: argparse.ArgumentParser) -> None:
    """The option that makes a run go back."""
    parser.add_argument(
        "--from",
        metavar="CHECKPOINT",
        help="go back to this checkpoint of the run, once; later ones are set aside (default: "
        "resume from the newest)",
    )


def check_init(init: Path | None, skip: list[str], *, run: Path) -> None:
    """Raise ValueError unless `--init` is there; a run that has a checkpoint needs it no more."""
    if skip and init is None:
        raise ValueError(f"--init-skip {skip[0]} needs --init: without it all weights are new")
    if init is not None and not init.exists() and not _names(run):
        raise ValueError(f"--init {init}: no such file or directory")


def find(run: Path, wanted: str) -> Path:
    """The checkpoint of a run that `--from` names by its name, images or path, or ValueError."""
    names, number = _names(run), _number(run, wanted)
    for name in names:
        if int(name) == number:
            return run / "checkpoints" / name
    raise ValueError(
        f"--from {wanted}: {run} has no such checkpoint; it has: {', '.join(names) or 'none'}"
        + (" (weights of another run: --init)" if number is None and "/" in wanted else "")
    )


def was_done(run: Path, wanted: str) -> bool:
    """Whether it was this checkpoint that the run went back to the last time.

    It may have been pruned since.
    """
    try:
        name = json.loads(record_file(run).read_text())["from"]
        return int(name) == _number(run, wanted)
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return False


def record(target: Path, *, run: Path) -> None:
    """Note that the run went back to a checkpoint."""
    entries = {"from": target.name, "time": time.time()}
    files.write(record_file(run), json.dumps(entries) + "\n")


def record_file(run: Path) -> Path:
    """Where that is noted."""
    return run / "launch" / "from.json"


def _number(run: Path, wanted: str) -> int | None:
    """The images that name a checkpoint of this run; None for something else."""
    given, own = Path(wanted), run / "checkpoints"
    elsewhere = len(given.parts) > 1 and given.resolve().parent != own.resolve()
    return int(given.name) if given.name.isdecimal() and not elsewhere else None


def _names(run: Path) -> list[str]:
    """The names of the run's checkpoints, newest first."""
    return [path.name for path in committed(run / "checkpoints")]
