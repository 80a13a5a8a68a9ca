"""Sets of ablations: a base preset, and rows that change settings of it. Needs no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.config import naming
from trainer.adm.config import check
from trainer.adm.respacing import kept_timesteps
from trainer.config import experiment as configs
from trainer.config import settings
from trainer.config.experiment import Config
from trainer.config.sections import FEWEST_SAMPLES

SETS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One experiment of a set: the base preset with changes, written as for `--set`."""

    name: str
    set: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    #: The name of an earlier row that it is compared with. Absent: the first.
    against: str | None = None

    def __post_init__(self) -> None:
        check(bool(self.directory), "rows.name", self.name, "a name with letters or digits")

    @property
    def directory(self) -> str:
        """The row's directory: its name in lower case, with - for all but letters and digits."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is drawn of each row, and what it is compared with."""

    images: int
    steps: str = "250"
    #: As `--reference` and `--network` of `python -m trainer.evaluate`.
    reference: str
    network: str

    def __post_init__(self) -> None:
        least = f"at least {FEWEST_SAMPLES}"
        check(self.images >= FEWEST_SAMPLES, "samples.images", self.images, least)


@dataclass(frozen=True, kw_only=True)
class AblationSet:
    """A set: rows are compared with the first, or with the one that they name."""

    base: str
    #: Changes of every row, written as for `--set`.
    set: tuple[str, ...] = ()
    samples: Samples
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        check(len(self.rows) >= 1, "rows", self.rows, "one or more")
        names = [row.directory for row in self.rows]
        check(len(set(names)) == len(names), "rows.name", names, "different names")
        for i, row in enumerate(self.rows):
            earlier = [each.name for each in self.rows[:i]]
            known = row.against is None or row.against in earlier
            check(known, f"rows.against of {row.name!r}", row.against, "the name of an earlier row")

    def changes(self, row: Row) -> tuple[str, ...]:
        """All changes of a row, written as for `--set`; its own replace those of every row."""
        return (*settings.without(self.set, row.set), *row.set)

    def config(self, row: Row) -> Config:
        """The whole config of a row; ValueError, which names the row, where a change is wrong."""
        with naming(f"row {row.name!r}"):
            config = configs.load(self.base, self.changes(row), unset=row.unset)
            self._check_drawn(config)
            return config

    def _check_drawn(self, config: Config) -> None:
        """Raise ValueError unless samples of a row can be drawn as `samples` says."""
        kind = config.objective
        check(kind == "denoise", "objective", kind, '"denoise": rows are drawn and compared')
        small = config.unet.small_size
        check(small is None, "model.small_size", small, "absent: rows are drawn from noise alone")
        with naming("samples.steps"):
            kept_timesteps(config.diffusion.steps, self.samples.steps)


def load(name: str, overrides: Sequence[str], *, unset: Sequence[str]) -> AblationSet:
    """Read the set of that name in trainer/ablations, or that TOML file; every row is checked."""
    path = settings.find(name, directory=SETS, kind="set")
    table = settings.read(path, overrides=overrides, unset=unset)
    with naming(f"{name}"):
        found: AblationSet = settings.build(AblationSet, table)
    for row in found.rows:
        found.config(row)
    return found
