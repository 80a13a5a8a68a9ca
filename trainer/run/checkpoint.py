"""Checkpoints on disk: their names and files, which of them are valid, which are superseded.

`RUN/checkpoints/000002560000/` (the clock, in images) holds one safetensors file for each kind of
fp32 state (`model`, `ema-0.9999`, `adam-m`, `adam-v`), keyed by the reference's state-dict names,
and `state.json`: the clock, what is not a tensor, the size and sha256 of every file, and a checksum
of itself. Any world size and ZeRO stage loads any checkpoint. `trainer.saver` writes them.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data import files
from data.version import version
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.ranks.group import agreed, from_main, gather
from trainer.ranks.world import World
from trainer.run.runstate import CHECKPOINT, committed
from trainer.run.trainstate import TrainState

# The result of a validation of the weights beside it.
VALIDATION = "validation.json"
# What makes a directory a checkpoint.
STATE = "state.json"
# The checksum of the rest of state.json. Checkpoints of version 0.1 have none.
_SELF = "sha256"
# Of state.json; checkpoints of version 0.1 do not name it.
_FORMAT = "checkpoint-1"


class Newer(ValueError):
    """A checkpoint of a later release: it is not damaged, and nothing older takes its place."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: whole when it was written, checked again before it is loaded."""

    path: Path
    state: TrainState
    #: Size and sha256 of each file, by its name.
    files: Mapping[str, Any]

    @property
    def images_seen(self) -> int:
        """The clock."""
        return self.state.images_seen

    def file(self, kind: str) -> Path:
        """The file of one kind of state."""
        return self.path / f"{kind}.safetensors"


def read(path: Path) -> Checkpoint:
    """Open one committed checkpoint directory.

    Raises:
        Newer: a later release has written it.
        ValueError: its state.json is missing, damaged, or that of another checkpoint.
        OSError: it cannot be read now, or not by this user.
    """
    try:
        entries = json.loads((path / STATE).read_text())
        _check_seal(entries)
        if (found := entries.get("format", _FORMAT)) != _FORMAT:
            raise Newer(f"{path} is of a later release (format = {found!r}): resume with that one")
        checkpoint = Checkpoint(path, TrainState.from_json(entries), entries["files"])
        if CHECKPOINT.fullmatch(path.name) and checkpoint.images_seen != int(path.name):
            raise ValueError(
                f"images = {checkpoint.images_seen}: must be {int(path.name)}, as the directory is "
                "named"
            )
    except Newer:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise ValueError(f"{path / STATE}: {error}") from None
    return checkpoint


def config_of(checkpoints: Path) -> Config | None:
    """The config that the newest readable checkpoint was trained with, if it tells.

    Raises:
        ValueError: it is of another release, and has other settings.
    """
    for path in committed(checkpoints):
        state = None
        with suppress(ValueError, OSError):  # who resumes from it hears of that
            state = read(path).state
        if state is not None:
            return _config_of(state, source=path / STATE) if state.config else None
    return None


def _config_of(state: TrainState, *, source: Path) -> Config:
    try:
        return configs.from_table(tomllib.loads(state.config))
    except ValueError as error:
        by = state.software.get("adm-trainer", "of another commit")
        raise ValueError(
            f"the config in {source}: {error}; adm-trainer {by} wrote it, and this is {version()}: "
            "resume with that one"
        ) from None


def fault_of(path: Path, *, kinds: Sequence[str] = (), rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a committed directory: with its state.json, or this rank's share of files.

    A file is missing, torn or damaged, or there is none of one of these kinds. Reads every byte.

    Raises:
        Newer, OSError: as `read`.
    """
    try:
        checkpoint = read(path)
    except Newer:
        raise
    except ValueError as error:
        return str(error)
    missing = [kind for kind in kinds if checkpoint.file(kind).name not in checkpoint.files]
    if missing:
        return f"{STATE} lists no {', '.join(missing)}"
    mine = sorted(checkpoint.files.items())[rank::ranks]
    found = (_file_fault(path / name, facts) for name, facts in mine)
    return next((fault for fault in found if fault is not None), None)


def sealed(state: TrainState, *, files: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of state.json, with a checksum of themselves."""
    entries = {"format": _FORMAT, **state.to_json(), "files": files}
    return {**entries, _SELF: _checksum(entries)}


def _check_seal(entries: Any) -> None:
    if not isinstance(entries, dict) or not isinstance(entries.get("files"), dict):
        raise ValueError("it is not the state of a checkpoint")
    if _SELF in entries and entries[_SELF] != _checksum(entries):
        raise ValueError("it does not match its own checksum")


def _checksum(entries: Mapping[str, Any]) -> str:
    """The checksum of a state's entries without their own checksum."""
    rest = {name: value for name, value in entries.items() if name != _SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def latest_valid(
    checkpoints: Path, *, kinds: Sequence[str], world: World, until: int | None = None
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest valid checkpoint with files of these kinds, and what is wrong with newer ones.

    None that is later than `until`, a clock, counts.
    All ranks must call it; each reads its share of the files, and all get the same answer.

    Raises:
        Broken: a file cannot be read now.
        Refused: one is of a later release, or may not be read.
    """
    skipped: dict[Path, str] = {}
    for path in from_main(lambda: committed(checkpoints)):
        if until is not None and int(path.name) > until:
            continue
        # A disk that cannot be read now is no damage.
        own = agreed(partial(fault_of, path, kinds=kinds, rank=world.rank, ranks=world.size))
        fault = next((fault for fault in gather(own) if fault), None)
        if fault is None:
            return read(path), skipped
        skipped[path] = fault
    return None, skipped


def _file_fault(file: Path, facts: Any) -> str | None:
    if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
        return f"{STATE} has no size and checksum of {file.name}"
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{file.name} has {size} bytes instead of {facts['bytes']}"
    if files.sha256(file) != facts["sha256"]:
        return f"{file.name} does not match its checksum"
    return None


def file_facts(file: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}


def superseded(names: Sequence[int], *, keep: int, keep_every: int | None) -> list[int]:
    """Which of a run's checkpoints, named by their clocks, are to be removed.

    The newest `keep` stay, and of the others the first at or after each multiple of `keep_every`.
    """
    ordered = sorted(names)
    return [
        images_seen
        for before, images_seen in zip([0, *ordered], ordered[:-keep], strict=False)
        if keep_every is None or images_seen // keep_every == before // keep_every
    ]


def best(paths: Sequence[Path]) -> Path | None:
    """Of committed checkpoints, newest first, the one with the smallest loss of validation.

    Those that were validated on other images than the newest such one do not count.
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        with suppress(OSError, ValueError):
            found[path] = json.loads((path / VALIDATION).read_text())
    sets = [(entry.get("fingerprint"), entry.get("count")) for entry in found.values()]
    losses = {
        path: entry["loss"]
        for (path, entry), of in zip(found.items(), sets, strict=True)
        if of == sets[0] and isinstance(entry.get("loss"), float) and math.isfinite(entry["loss"])
    }
    return min(losses, key=lambda path: losses[path], default=None)
