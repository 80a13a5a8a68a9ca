"""An experiment: one complete TOML file, read into frozen dataclasses.

Each dataclass sits on the module it configures; this file composes them. What is wrong in a
file or in a `--set` raises ValueError naming the setting, its value and the way out, before any
process group or GPU is touched.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.stream import DataConfig
from trainer.adm.diffusion import DiffusionConfig
from trainer.adm.schedule import kept_timesteps
from trainer.adm.unet import ClassifierConfig, UNetConfig

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
    precision: Literal["fp32", "bf16", "fp16"]
    timesteps: Literal["uniform", "loss-second-moment"] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch", "micro_batch"):
            _require(
                getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1"
            )
        _require(self.images % self.batch == 0, "training.images", self.images,
                 f"a multiple of training.batch = {self.batch}")  # fmt: skip
        _require(0 < self.lr < math.inf, "training.lr", self.lr, "a number above 0")
        _require(0 <= self.weight_decay < math.inf, "training.weight_decay", self.weight_decay,
                 "a number from 0")  # fmt: skip
        _require(self.clip is None or 0 < self.clip < math.inf, "training.clip", self.clip,
                 "a number above 0, or absent")  # fmt: skip
        _require(self.warmup_images >= 0, "training.warmup_images", self.warmup_images,
                 "at least 0")  # fmt: skip
        _require(0 <= self.seed < 2**63, "training.seed", self.seed, "from 0 to 2^63 - 1")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "training.betas",
                 self.betas, "two numbers in [0, 1)")  # fmt: skip
        _require(len(set(self.ema)) == len(self.ema) >= 1 and all(0 <= d < 1 for d in self.ema),
                 "training.ema", self.ema, "one or more different decays in [0, 1)")  # fmt: skip

    def learning_rate(self, images: int) -> float:
        """Of the step that starts at clock `images`: linear warm-up, then linear anneal to 0."""
        warm = min(1.0, (images + self.batch) / self.warmup_images) if self.warmup_images else 1.0
        left = 1.0 - images / self.images if self.anneal else 1.0
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


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """How often things are done, in images."""

    log: int
    checkpoint: int
    #: The newest checkpoints that are kept.
    keep: int = 3
    #: Checkpoints at multiples of this are never pruned. Absent: only the newest are kept.
    keep_every: int | None = None
    #: Grids drawn from the EMA weights. Absent: none.
    samples: int | None = None
    #: Images of a grid, and the respacing of the 1000 steps to draw them.
    samples_count: int = 16
    samples_steps: str = "ddim25"

    def __post_init__(self) -> None:
        for field in ("log", "checkpoint", "keep", "keep_every", "samples", "samples_count"):
            value = getattr(self, field)
            _require(value is None or value >= 1, f"intervals.{field}", value, "at least 1")


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
        if isinstance(self.model, ClassifierConfig):
            _require(self.training.timesteps == "uniform", "training.timesteps",
                     self.training.timesteps, '"uniform" for a classifier')  # fmt: skip
            _require(self.intervals.samples is None, "intervals.samples", self.intervals.samples,
                     "absent for a classifier, which draws nothing")  # fmt: skip
        if self.intervals.samples is not None:
            try:
                kept_timesteps(self.diffusion.steps, self.intervals.samples_steps)
            except ValueError as error:
                raise ValueError(f"intervals.samples_steps: {error}") from None


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: it must be {expected}")


def load(preset: str | Path, changes: Iterable[str] = (), *, absent: Iterable[str] = ()) -> Config:
    """Read the preset of that name, or that TOML file, with `changes` such as "training.lr = 1e-4".

    `absent` names settings that the file has and this experiment has not, such as "training.clip".

    Raises:
        ValueError: no such preset, or a setting that is unknown, missing, of another type, or
            out of its range.
    """
    path = find(preset)
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for change in changes:
        _merge(table, _parse_change(change), path=())
    for name in absent:
        _remove(table, name)
    return from_table(table, where=str(preset))


def find(preset: str | Path) -> Path:
    """The file of a preset's name or path."""
    path = Path(preset)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"no such preset file: {path}")
        return path
    names = sorted(p.stem for p in PRESETS.glob("*.toml"))
    if str(preset) not in names:
        raise ValueError(f"unknown preset {str(preset)!r}{_nearest(str(preset), names)}; "
                         f"there are: {', '.join(names)}")  # fmt: skip
    return PRESETS / f"{preset}.toml"


def from_table(table: Mapping[str, Any], *, where: str) -> Config:
    """Build the `Config` that a TOML table spells out; facts that sections share are filled in."""
    sections = {key: dict(v) for key, v in table.items() if isinstance(v, Mapping)}
    table = {**table, **sections}
    model, diffusion = sections.get("model", {}), sections.get("diffusion", {})
    if table.get("objective") == "denoise":
        model["learn_sigma"] = diffusion.get("variance", "learned") == "learned"
    if "data" in sections and "image_size" in model:
        sections["data"]["image_size"] = model["image_size"]
    kinds = {"denoise": UNetConfig, "classify": ClassifierConfig}
    kind = kinds.get(table.get("objective", ""))
    if kind is None:
        raise ValueError(f'{where}: objective = {table.get("objective")!r}: '
                         'it must be "denoise" or "classify"')  # fmt: skip
    try:
        return typing.cast(Config, _build(Config, table, name="", model=kind))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _build(kind: Any, table: Mapping[str, Any], *, name: str, model: type | None = None) -> Any:
    """An instance of dataclass `kind` from a table; keys and types must be its own."""
    hints = typing.get_type_hints(kind)
    if model is not None:
        hints["model"] = model
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise ValueError(f"unknown setting {_join(name, key)!r}{_nearest(key, fields)}")
    for key, field in fields.items():
        if key not in table and field.default is dataclasses.MISSING:
            raise ValueError(f"setting {_join(name, key)!r} is missing")
    return kind(**{k: _convert(hints[k], v, name=_join(name, k)) for k, v in table.items()})


def _convert(hint: Any, value: Any, *, name: str) -> Any:
    """`value` as type `hint`, losslessly: an int may stand for a float, a list for a tuple."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} = {value!r}: it must be a section, [{name}]")
        return _build(hint, value, name=name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(f'"{a}"' for a in arguments)
            raise ValueError(f"{name} = {value!r}: it must be one of {choices}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert(next(a for a in arguments if a is not type(None)), value, name=name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], v, name=f"{name}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        expected = "a list" if origin is tuple else f"of type {hint.__name__}"
        raise ValueError(f"{name} = {value!r}: it must be {expected}")
    return value


def _parse_change(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise ValueError(
            f"--set {text!r} is not TOML; write it as in the file: --set 'training.lr = 1e-4', "
            """--set 'training.precision = "bf16"'"""
        ) from None


def _merge(table: dict[str, Any], change: Mapping[str, Any], *, path: tuple[str, ...]) -> None:
    for key, value in change.items():
        if isinstance(value, Mapping):
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set: {'.'.join((*path, key))} is a value, not a section")
            _merge(inner, value, path=(*path, key))
        else:
            table[key] = value


def _remove(table: dict[str, Any], name: str) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = table.get(section)
        table = inner if isinstance(inner, dict) else {}
    if key not in table:
        known = [".".join([*sections, k]) for k in table]
        raise ValueError(f"--unset {name}: the preset has no such setting{_nearest(name, known)}")
    del table[key]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


#: Facts that `from_table` fills in; they are not written, so that a file says each thing once.
_DERIVED = {"model.learn_sigma", "data.image_size"}


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, without those that are absent."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(value):
            inner, key = getattr(value, field.name), _join(name, field.name)
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


#: What a run may not change when it is resumed: its weights or its order would mean another thing.
_FIXED = ("objective", "model", "diffusion", "training.seed", "training.timesteps",
          "training.ema", "data.streams", "data.block")  # fmt: skip
_FREE = ("model.checkpoint",)


def changes_between(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as name -> (old, new).

    Raises:
        ValueError: one of them is part of what the run is.
    """
    before, after = flatten(old), flatten(new)
    changed = {
        name: (before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
    fixed = [
        f"{name} = {a!r} (now {b!r})"
        for name, (a, b) in changed.items()
        if name not in _FREE and any(name == f or name.startswith(f + ".") for f in _FIXED)
    ]
    if fixed:
        raise ValueError(
            f"the run was started with another config: {', '.join(fixed)}; "
            "give the same preset and --set, or another --run directory"
        )
    return changed
