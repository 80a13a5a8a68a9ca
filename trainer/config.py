"""An experiment: one complete TOML file, read into frozen dataclasses.

    python -m trainer.config PRESET [--set ...] [--ranks N]     print it resolved, or what is wrong

Each dataclass sits beside what it configures; this file composes them. No torch here: a login node
checks a config before anything is queued.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig
from data.exits import REFUSED, CommandParser
from trainer import settings
from trainer.adm.config import (
    ClassifierConfig,
    DiffusionConfig,
    UNetConfig,
    check,
    check_choice,
)
from trainer.adm.respacing import kept_timesteps

Precision = Literal["fp32", "bf16", "fp16"]
Timesteps = Literal["uniform", "loss-second-moment"]

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation. All spans are counted in images, the one clock of a run."""

    images: int
    batch: int
    #: At most this many images at once on a rank; gradient accumulation makes up the batch.
    micro_batch: int
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_images: int = 0
    #: Lower the learning rate linearly to zero at `images`.
    anneal: bool = False
    #: Largest global gradient norm; larger gradients are scaled down to it. Absent: no clipping.
    clip: float | None = None
    #: EMA decays per step; the first is the one that sample grids are drawn from.
    ema: tuple[float, ...]
    precision: Precision
    timesteps: Timesteps = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch", "micro_batch"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        divides = self.images % self.batch == 0
        self._check(divides, "images", f"a multiple of training.batch = {self.batch}")
        self._check(0 < self.lr < math.inf, "lr", "a number above 0")
        self._check(0 <= self.weight_decay < math.inf, "weight_decay", "a number from 0")
        clips = self.clip is None or 0 < self.clip < math.inf
        self._check(clips, "clip", "a number above 0, or absent")
        self._check(self.warmup_images >= 0, "warmup_images", "at least 0")
        self._check(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1")
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        self._check(two, "betas", "two numbers in [0, 1)")
        differ = len(set(self.ema)) == len(self.ema) >= 1 and all(0 <= d < 1 for d in self.ema)
        self._check(differ, "ema", "one or more different decays in [0, 1)")
        check_choice("training.precision", self.precision, Precision)
        check_choice("training.timesteps", self.timesteps, Timesteps)

    def _check(self, holds: bool, name: str, expected: str) -> None:
        check(holds, f"training.{name}", getattr(self, name), expected)

    def learning_rate(self, images_seen: int) -> float:
        """Of the step that starts at `images_seen`: linear warm-up, then linear anneal to 0."""
        warm = (
            min(1.0, (images_seen + self.batch) / self.warmup_images) if self.warmup_images else 1.0
        )
        left = 1.0 - images_seen / self.images if self.anneal else 1.0
        return self.lr * warm * max(left, 0.0)

    def micro_batch_on(self, ranks: int) -> int:
        """The largest even cut of a rank's share that is at most `micro_batch`.

        Raises:
            ValueError: the batch does not divide among `ranks`.
        """
        share, rest = divmod(self.batch, ranks)
        if rest:
            raise ValueError(
                f"training.batch = {self.batch} does not divide among {ranks} ranks: "
                "set training.batch to a multiple of the number of ranks, or start fewer"
            )
        return max(n for n in range(1, min(share, self.micro_batch) + 1) if share % n == 0)

    def badly_cut_on(self, ranks: int) -> str | None:
        """What to set where the batch is cut into micro-batches of less than half the limit."""
        share, micro = self.batch // ranks, self.micro_batch_on(ranks)
        if 2 * micro > min(share, self.micro_batch):
            return None
        steps = -(-share // self.micro_batch)
        near = [ranks * steps * (share // steps), ranks * steps * -(-share // steps)]
        return (
            f"training.batch = {self.batch} is cut into {share // micro} micro-batches of {micro} "
            f"on each of {ranks} ranks, though training.micro_batch = {self.micro_batch}: "
            f"{near[0]} or {near[1]} would be {steps} of up to {self.micro_batch}"
        )


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """How often things are done, in images."""

    log: int
    checkpoint: int
    #: The newest checkpoints that are kept.
    keep: int = 3
    #: The first checkpoint at or after each multiple of this stays. Absent: the newest alone stay.
    keep_every: int | None = None
    #: Grids drawn from the EMA weights. Absent: none.
    samples: int | None = None
    #: Images of a grid, and the respacing of the 1000 steps to draw them.
    samples_count: int = 16
    samples_steps: str = "ddim25"

    def __post_init__(self) -> None:
        for field in ("log", "checkpoint", "keep", "keep_every", "samples", "samples_count"):
            value = getattr(self, field)
            check(value is None or value >= 1, f"intervals.{field}", value, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment: what is learned, from what, how, and how often it reports."""

    objective: Literal["denoise", "classify"]
    model: UNetConfig | ClassifierConfig
    diffusion: DiffusionConfig
    training: TrainingConfig
    data: DataConfig
    intervals: IntervalConfig

    def __post_init__(self) -> None:
        every, timesteps = self.intervals, self.training.timesteps
        if isinstance(self.model, ClassifierConfig):
            uniform = timesteps == "uniform"
            check(uniform, "training.timesteps", timesteps, '"uniform" for a classifier')
            check(
                every.samples is None,
                "intervals.samples",
                every.samples,
                "absent for a classifier, which draws nothing",
            )
        if every.samples is not None:
            try:
                kept_timesteps(self.diffusion.steps, every.samples_steps)
            except ValueError as error:
                raise ValueError(f"intervals.samples_steps: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _DenoiseConfig(Config):
    model: UNetConfig


@dataclass(frozen=True, kw_only=True)
class _ClassifyConfig(Config):
    model: ClassifierConfig


def load(preset: str | Path, overrides: Iterable[str] = (), *, unset: Iterable[str] = ()) -> Config:
    """Read the preset of that name, or that TOML file, with the changes of `--set` and `--unset`.

    Raises:
        ValueError: no such preset, or a setting that is unknown, missing, of another type, out of
            its range, or derived from another.
    """
    path = settings.find(preset, directory=PRESETS)
    table = settings.read(path, overrides=overrides, unset=unset)
    try:
        return from_table(table)
    except ValueError as error:
        raise ValueError(f"{preset}: {error}") from None


def from_table(table: Mapping[str, Any]) -> Config:
    """Build the `Config` that a TOML table spells out; derived settings are filled in.

    Raises:
        ValueError: as `load`.
    """
    sections = {key: dict(v) for key, v in table.items() if isinstance(v, Mapping)}
    for name, source in _DERIVED.items():
        section, _, key = name.partition(".")
        if key in sections.get(section, {}):
            raise ValueError(f"{name} cannot be set: it follows from {source}; set that instead")
    model, diffusion = sections.get("model", {}), sections.get("diffusion", {})
    objective = table.get("objective", "")
    check_choice("objective", objective, Literal["denoise", "classify"])
    if objective == "denoise":
        model["learn_sigma"] = diffusion.get("variance", "learned") == "learned"
    if "data" in sections and "image_size" in model:
        sections["data"]["image_size"] = model["image_size"]
    kind = _DenoiseConfig if objective == "denoise" else _ClassifyConfig
    return typing.cast(Config, settings.build(kind, {**table, **sections}))


# What follows from other settings; it is not written, so that a file says each thing once.
_DERIVED = {"model.learn_sigma": "diffusion.variance", "data.image_size": "model.image_size"}


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, without those that are absent."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(value):
            inner, key = getattr(value, field.name), settings.join(name, field.name)
            if dataclasses.is_dataclass(inner):
                yield from walk(inner, key)
            elif inner is not None and key not in _DERIVED:
                yield key, inner

    return dict(walk(config, ""))


def to_toml(config: Config) -> str:
    """The file that `load` reads back as the same config."""
    lines, section = [], ""
    for name, value in flatten(config).items():
        head, _, key = name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the resolved preset; returns the exit status."""
    parser = CommandParser(
        prog="python -m trainer.config",
        description="Print a preset with all its settings, or the error in it.",
    )
    parser.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    settings.add_overrides(parser)
    parser.add_argument(
        "--ranks", type=int, help="also check the batch on so many ranks (default: unchecked)"
    )
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.preset, arguments.set, unset=arguments.unset)
        if arguments.ranks is not None:
            config.training.micro_batch_on(arguments.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    print(to_toml(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
