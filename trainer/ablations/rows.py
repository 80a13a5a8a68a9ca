"""How far a row of a set is: how its training ended, and which of its results are outdated.

How it ended is read from the run's own state: torchrun ends with 1 whatever its ranks ended with.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.exits import FAILED, REFUSED, TO_BE_CONTINUED
from trainer.ablations.sets import AblationSet, Row
from trainer.engine import averages
from trainer.run import checkpoint as checkpoints
from trainer.run.lease import stop_file
from trainer.run.runstate import RunState
from trainer.sampling.output import REQUEST
from trainer.sampling.samplefile import open_samples


def training_status(run: Path, *, before: RunState | None, status: int) -> int:
    """The exit status of a training of `run`, whose launcher ended with `status`; 0 if finished.

    `before` is the run's state before that start.
    """
    now = RunState.read(run)
    if now is None or (before is not None and now.starts == before.starts):
        return status or FAILED  # it ended before it claimed the run
    known = {"finished": 0, "stopped": TO_BE_CONTINUED, "refused": REFUSED}
    return known.get(now.state, status or FAILED)


def way_on(run: Path) -> str:
    """How to resume a row that was stopped, in words."""
    if (file := stop_file(run)).exists():
        return f"to resume, delete {file} and rerun the same command"
    return "rerun the same command to resume"


def outdated(found: AblationSet, row: Row, *, runs: Path) -> list[Path]:
    """The row's figures and samples that were made of other weights than its last checkpoint's.

    While the run is not finished, all of them; none where the weights are not known.
    """
    here, training = runs / row.directory, found.config(row).training
    state = RunState.read(here / "run")
    if state is None or state.checkpoint is None:
        return []
    try:
        last = checkpoints.read(here / "run" / "checkpoints" / state.checkpoint)
    except (ValueError, OSError):  # it was removed, or `trainer.sample` says what is wrong
        return []
    weights = last.file(averages.exponential(training.ema[0])).name
    checksum = last.files.get(weights, {}).get("sha256")
    is_final = state.state == "finished" or last.images_seen >= training.images
    return [
        path
        for path, sources in _sources(here)
        if sources is not None and not (is_final and checksum in (None, sources[0]))
    ]


def remove_outdated(
    found: AblationSet, row: Row, *, runs: Path, say: Callable[[str], None]
) -> None:
    """Remove what is `outdated`; it is then made again."""
    for path in outdated(found, row, runs=runs):
        say(f"row {row.name!r}: removed {path}: it was of an earlier state of the run")
        if path.is_dir():
            shutil.rmtree(path)
            continue
        if path.suffix == ".npz":
            path.with_suffix(".png").unlink(missing_ok=True)
        path.unlink()


def _sources(here: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """The paths of a row's results, with the checksums of the weights they are of, if known."""
    readers: dict[str, Callable[[Path], Any]] = {
        "figures.json": lambda path: json.loads(path.read_text())["about"]["samples"]["drawn"],
        "samples.npz": lambda path: open_samples(path).record,
        "samples.parts": lambda path: json.loads((path / REQUEST).read_text()),
    }
    for name, record in readers.items():
        found = None
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = record(here / name)["sources"]
        yield here / name, found or None
