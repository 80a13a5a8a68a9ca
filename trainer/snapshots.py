"""`RUN/averages/000008388608/`: snapshots of a run's power-function averages.

Each directory holds one safetensors file for each width, and `state.json` with their sizes and
checksums. Unlike checkpoints they are never pruned: `python -m trainer.ema` combines all of them,
from the first on, to averages of other widths.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data import files
from trainer import weights
from trainer.adm.ema import Profile
from trainer.config.experiment import Config
from trainer.engine import averages
from trainer.engine.compute import DTYPES
from trainer.ranks.group import gather, writers
from trainer.ranks.world import World
from trainer.run.checkpoint import STATE, file_facts
from trainer.run.directory import Run
from trainer.run.lease import LeaseLost
from trainer.run.runstate import committed
from trainer.run.trainstate import Gathered

# The suffix of a snapshot that is no longer part of the run.
_ASIDE = "superseded"


@dataclass(frozen=True)
class Snapshot:
    """The averages of a run at one time, on disk."""

    path: Path
    #: The clock at the last update of the weights: the averages are those of this time.
    updated_at: int
    #: As in `Profile`.
    gaps: tuple[tuple[float, float], ...]
    #: Size and sha256 of each file, by its name.
    files: Mapping[str, Any]

    @property
    def images_seen(self) -> int:
        """The clock."""
        return int(self.path.name)

    def profile(self, file: str) -> Profile:
        """The profile of the average in a file."""
        width = float(file.removesuffix(".safetensors").partition("-")[2])
        return Profile(self.updated_at, width, self.gaps)

    @classmethod
    def read(cls, path: Path) -> "Snapshot":
        """One snapshot's directory; ValueError where its state.json is missing or damaged.

        Raises:
            PermissionError: this user may not read it.
        """
        try:
            entries = json.loads((path / STATE).read_text())
            gaps = [(before, after) for before, after in entries.get("gaps", [])]
            updated_at = entries["updated_at"]
            # A gap that ends here: since the run went back, no step was averaged.
            while gaps and gaps[-1][1] == updated_at:
                updated_at, _ = gaps.pop()
            found = cls(path, updated_at, tuple(gaps), entries["files"])
            for name, facts in found.files.items():
                found.profile(name), facts["bytes"], facts["sha256"]
        except PermissionError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / STATE}: {type(error).__name__}: {error}") from None
        return found


def directory(run: Path) -> Path:
    """Where the snapshots of a run are."""
    return run / "averages"


class Snapshots:
    """Writes snapshots of a run's power-function averages. All ranks make each call together.

    Training waits while one is written. One that cannot be written is reported, and training goes
    on: averages that are made of the others are then a little less exact.
    """

    def __init__(self, run: Run, config: Config, *, world: World) -> None:
        self._run, self._world = run, world
        self._total, self._every = config.training.images, config.intervals.averages
        self._names = [averages.power(width) for width in config.training.ema_widths]
        self._precision = config.intervals.averages_precision

    def open(self, images_seen: int, *, parameters: int) -> None:
        """Before training: move later snapshots aside, and log the disk space that is needed."""
        self.set_aside_later(images_seen)
        if self._every is None or not self._world.is_main:
            return
        left = self._total // self._every - images_seen // self._every
        need = left * len(self._names) * parameters * DTYPES[self._precision].itemsize
        free = shutil.disk_usage(self._run.path).free
        lack = f", of which the disk has {_gib(free)}" if free < need else ""
        self._run.log(
            f"averages: {left} snapshots in {self._precision} to come, {_gib(need)}{lack}"
        )

    def take(
        self,
        source: Gathered,
        *,
        images_seen: int,
        updated_at: int,
        gaps: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Write a snapshot."""
        began = time.monotonic()
        if updated_at == 0:  # all steps were skipped
            return
        partial = directory(self._run.path) / f".{images_seen:012d}.partial"
        facts, fault = {}, None
        for name, owner in writers(self._names, self._world):
            whole = source.gather(name, to=owner)
            if owner == self._world.rank and fault is None:
                try:
                    file = self._write(partial, name, whole)
                    facts[file.name] = file_facts(file)
                except (OSError, ValueError) as error:
                    fault = f"rank {self._world.rank}: {files.reason(error)}"
        everyone = gather((facts, fault))
        if self._world.is_main:
            listed = {name: entry for some, _ in everyone for name, entry in some.items()}
            fault = next((why for _, why in everyone if why), None)
            try:
                self._run.check_lease()
                if fault is not None:
                    raise ValueError(fault)
                self._commit(partial, {"updated_at": updated_at, "gaps": gaps, "files": listed})
                seconds = time.monotonic() - began
                self._run.log(f"averages of image {images_seen:,} kept in {seconds:.1f} s")
            except LeaseLost:
                raise
            except (OSError, ValueError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                why = files.reason(error)
                self._run.log(f"averages of image {images_seen:,} are not kept: {why}")

    def _write(self, partial: Path, name: str, whole: Mapping[str, Tensor]) -> Path:
        """Write one file to disk.

        Raises:
            OSError: it cannot be written.
            ValueError: a weight is beyond the range of the precision.
        """
        tensors = {key: value.to(DTYPES[self._precision]) for key, value in whole.items()}
        for key, value in tensors.items():
            if not value.isfinite().all():
                way_out = ', set intervals.averages_precision = "fp32"'
                raise ValueError(f"{name} of {key} is not finite in {self._precision}{way_out}")
        partial.mkdir(parents=True, exist_ok=True)
        file = partial / f"{name}.safetensors"
        weights.save(file, tensors, metadata={"kind": name})
        return file

    def _commit(self, partial: Path, state: Mapping[str, Any]) -> None:
        final = partial.with_name(partial.name.strip(".").removesuffix(".partial"))
        files.write(partial / STATE, json.dumps({"format": "averages-1", **state}, indent=1))
        if final.exists():
            files.set_aside(final, _ASIDE)
        partial.rename(final)
        files.sync(final.parent)

    def set_aside_later(self, images_seen: int) -> None:
        """Rename snapshots beyond the clock from which the run trains: they are not part of it."""
        if not self._world.is_main:
            return
        self._run.check_lease()
        for path in directory(self._run.path).glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        later = [p for p in committed(directory(self._run.path)) if int(p.name) > images_seen]
        gone = f"snapshots beyond image {images_seen:,} are not of the run any more"
        try:
            for path in later:
                files.set_aside(path, _ASIDE)
        except OSError as error:
            why = files.write_fault(directory(self._run.path)) or files.reason(error)
            self._run.log(
                f"averages: {gone} and cannot be renamed ({why}): remove {path} and later ones, or "
                "`python -m trainer.ema` takes them"
            )
        else:
            if later:
                self._run.log(f"averages: {len(later)} {gone}: they are now *.{_ASIDE}*")


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
