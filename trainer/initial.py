"""`--init`: the weights that a run starts from, found, checked, and recorded in `RUN/init.json`.

They come from a run (its newest checkpoint), a checkpoint, or a weights file. The main rank reads
them, only when a run begins; a run that has a checkpoint does not need them any more.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import files
from data.config import naming
from data.mixture import Dataset
from trainer import classes, diffusers_format, weights
from trainer.adm.config import ClassifierConfig
from trainer.adm.unet import build
from trainer.config.experiment import Config
from trainer.config.settings import is_in
from trainer.networks import TrainedNetwork, config_of, names_of
from trainer.run import origin
from trainer.run.directory import Run
from trainer.run.runstate import committed

# Entries of `RUN/init.json`.
_RECORDED = ("init", "file", "sha256", "skip")


@dataclass(frozen=True, kw_only=True)
class Initial:
    """The weights of `--init`, as `RUN/init.json` records them."""

    #: The path of `--init`, absolute.
    init: str
    #: The weights file, and its checksum.
    file: str
    sha256: str
    #: The parameters or modules of `--init-skip`: those of the network are initialised from the
    #: seed, and those of the file are not loaded.
    skip: tuple[str, ...] = ()
    #: The part that differs from class to class, where it is taken, and the names of the classes
    #: that it was trained on, where they are known. Neither is recorded.
    class_part: str = ""
    class_names: tuple[str, ...] | None = None

    @classmethod
    def find(cls, path: Path, *, skip: Sequence[str], config: Config) -> "Initial":
        """The weights at `path`, which are checked to fit the config's network.

        Raises:
            ValueError: there are none, they do not fit, or some are not finite.
        """
        file = diffusers_format.find(path) or path
        trained: Config | None
        if file.is_dir():
            with naming(f"--init {path}"):
                found = TrainedNetwork.find(path)
            file, checksum, trained = found.file, found.sha256, found.config
        else:
            checksum = files.sha256(file) if file.is_file() else ""
            trained = config_of(path)
        initial = cls(
            init=str(path.absolute()), file=str(file.absolute()), sha256=checksum, skip=tuple(skip)
        )
        read = initial._read(config)
        weights.check_finite(read, source=f"--init {file}")
        part = "out" if isinstance(config.model, ClassifierConfig) else "label_emb"
        is_taken = any(is_in(name, part) for name in read)
        names = names_of(trained) if trained else None
        return replace(initial, class_part=part if is_taken else "", class_names=names)

    def _is_skipped(self, name: str) -> bool:
        return any(is_in(name, skip) for skip in self.skip)

    def _read(self, config: Config) -> dict[str, Tensor]:
        """The file's weights without those to skip; ValueError where they do not fit."""
        with torch.device("meta"):
            own = build(config.model).state_dict()
        loaded = diffusers_format.ours(weights.load(self.file), config=config.model)
        for skip in self.skip:
            if not any(is_in(name, skip) for name in (*own, *loaded)):
                modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in (*own, *loaded)))
                raise ValueError(
                    f"--init-skip {skip}: neither the network nor {self.file} has such a part; "
                    f"there are: {modules}"
                )
        kept = {name: value for name, value in loaded.items() if not self._is_skipped(name)}
        wanted = {name: value for name, value in own.items() if not self._is_skipped(name)}
        hint = partial(_hint, own=frozenset(name.split(".")[0] for name in own))
        weights.check_fit(wanted, kept, source=f"--init {self.file}", hint=hint)
        return kept

    def load(self, config: Config) -> dict[str, Tensor]:
        """The weights by parameter name; those to skip are initialised from the seed."""
        kept = self._read(config)
        if not self.skip:
            return kept
        torch.manual_seed(config.training.seed)
        return {**build(config.model).state_dict(), **kept}

    def __str__(self) -> str:
        without = f"; without {', '.join(self.skip)}" if self.skip else ""
        return f"{self.file} (sha256 {self.sha256[:12]}{without})"


def choose(arguments: argparse.Namespace, *, run: Run, config: Config) -> Initial | None:
    """The weights of `--init`; None without it, or if the run resumes from a checkpoint.

    `arguments` are those of the command line: `init` and `init_skip`.

    Raises:
        ValueError: as `Initial.find`; or the run was started from other weights.
    """
    path, skip = arguments.init, arguments.init_skip
    origin.check_init(path, skip, run=run.path)
    if path is None:
        return None
    if committed(run.checkpoints):
        _check_same(path, skip=skip, run=run)
        return None
    return Initial.find(path, skip=skip, config=config)


def remarks(initial: Initial | None, *, shards: Dataset) -> list[str]:
    """What the log says where other classes, or unknown ones, start from those of `--init`."""
    if initial is None or not initial.class_part:
        return []
    anew = f"to start them from the seed, add --init-skip {initial.class_part}"
    if initial.class_names is None:
        which = f"class 0, {shards.classes[0]!r}, starts from its class 0, and so on"
        return [f"--init {initial.init} does not name its classes: {which}; {anew}"]
    # Shards may have the first ones alone.
    known = initial.class_names[: len(shards.classes)]
    if differs := classes.difference(shards.classes, known, named=shards.where):
        same = "each class starts from the one with its number"
        return [f"--init {initial.init}: {differs}: {same}; {anew}"]
    return []


def record(initial: Initial | None, *, run: Run) -> None:
    """Write to `RUN/init.json` what the run starts from; None stands for its seed.

    It replaces the record of an earlier start that saved no checkpoint.
    """
    entries = {"init": None} if initial is None else {n: vars(initial)[n] for n in _RECORDED}
    files.write(_file(run), json.dumps({"format": "run-init-1", **entries}, indent=1) + "\n")


def _check_same(path: Path, *, skip: Sequence[str], run: Run) -> None:
    """Raise ValueError unless the run was started from these weights; version 0.1 has no record."""
    try:
        entries = json.loads(_file(run).read_text())
        facts = {name: entries[name] for name in ("init", "file", "sha256") if entries["init"]}
        before = Initial(**facts, skip=tuple(entries["skip"])) if facts else None
    except (OSError, ValueError, LookupError, TypeError):
        print(f"--init {path} is not used: {run.path} resumes from its checkpoint", flush=True)
        return
    if before is None:
        raise ValueError(
            f"--init {path}: {run.path} was started from its seed and has a checkpoint: leave "
            "--init out to resume it, or name another --run directory to start from these weights"
        )
    known = str(path.absolute()) in (before.init, before.file)
    same = known or (path.is_file() and files.sha256(path) == before.sha256)
    if not same or tuple(skip) != before.skip:
        with_skip = "".join(f" --init-skip {name}" for name in before.skip)
        raise ValueError(
            f"{run.path} was started with --init {before.init}{with_skip}: leave --init out to "
            "resume it, or name another --run directory"
        )


def _hint(names: Sequence[str], *, own: frozenset[str]) -> str:
    """The --init-skip to add if one or two modules differ; `own` are those of the network."""
    parts = list(dict.fromkeys(name.split(".")[0] for name in names))
    if len(parts) > 2:
        return ""
    ways = [f"start {part} from the seed" if part in own else f"leave {part} out" for part in parts]
    return f"; to {' and '.join(ways)}, add --init-skip {' '.join(parts)}"


def _file(run: Run) -> Path:
    return run.path / "init.json"
