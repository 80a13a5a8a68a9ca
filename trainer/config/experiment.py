"""An experiment: one complete TOML file, read into frozen dataclasses.

Each dataclass sits beside what it configures; this file composes them. No torch here: a login node
checks a config before anything is queued.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig, naming, shown
from trainer.adm.config import (
    ClassifierConfig,
    DiffusionConfig,
    NetworkConfig,
    UNetConfig,
    check,
    check_choice,
)
from trainer.adm.respacing import kept_timesteps
from trainer.config import settings
from trainer.config.sections import (
    BoardConfig,
    EvaluationConfig,
    GuardConfig,
    IntervalConfig,
    TrainingConfig,
)

PRESETS = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment: what is learned, from what, how, and how often it reports."""

    objective: Literal["denoise", "classify"]
    model: NetworkConfig
    diffusion: DiffusionConfig
    training: TrainingConfig
    data: DataConfig
    intervals: IntervalConfig
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    board: BoardConfig = dataclasses.field(default_factory=BoardConfig)
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        every, timesteps = self.intervals, self.training.timesteps
        dropout, model = self.training.label_dropout, self.model
        check(
            not dropout
            or (not isinstance(model, ClassifierConfig) and model.num_classes is not None),
            "training.label_dropout",
            dropout,
            "0, or absent, but for a denoiser with model.num_classes",
        )
        if isinstance(self.model, ClassifierConfig):
            uniform = timesteps == "uniform"
            check(uniform, "training.timesteps", timesteps, '"uniform" for a classifier')
            for name, value in (("samples", every.samples), ("evaluate", every.evaluate)):
                absent = "absent for a classifier, which draws nothing"
                check(value is None, f"intervals.{name}", value, absent)
        widths, validation = self.training.ema_widths or None, self.data.validation
        _check_with("intervals.averages", every.averages, "training.ema_widths", widths)
        _check_with("intervals.validate", every.validate, "data.validation", validation)
        if every.samples is not None:
            with naming("intervals.samples_steps"):
                kept_timesteps(self.diffusion.steps, every.samples_steps)
        self._check_evaluation()

    @property
    def unet(self) -> UNetConfig:
        """The network of a denoiser."""
        assert isinstance(self.model, UNetConfig)
        return self.model

    def _check_evaluation(self) -> None:
        every, asked, model = self.intervals.evaluate, self.evaluation, self.model
        for name, value in (("reference", asked.reference), ("network", asked.network)):
            _check_with(f"evaluation.{name}", value, "intervals.evaluate", every)
        if every is None:
            return
        trained = bool(self.training.label_dropout)
        without = "absent without training.label_dropout"
        check(asked.cfg is None or trained, "evaluation.cfg", asked.cfg, without)
        classes = model.num_classes or 0
        random = f'"random" where evaluation.images is below model.num_classes = {classes}'
        covered = asked.labels == "random" or asked.images >= classes
        check(covered, "evaluation.labels", asked.labels, random)
        enlarges = self.unet.small_size is not None
        needed = "set if an upsampler is evaluated, which enlarges these images"
        there = self.data.validation is not None
        check(there or not enlarges, "data.validation", self.data.validation, needed)
        with naming("evaluation.steps"):
            kept_timesteps(self.diffusion.steps, asked.steps)


def _check_with(name: str, value: object, other: str, given: object) -> None:
    """Raise ValueError unless a setting is there where the other one is, and only there."""
    expected = f"set if {other} is, and absent without"
    check((value is None) is (given is None), name, value, expected)


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
    with naming(f"{preset}"):
        return from_table(table)


def from_table(table: Mapping[str, Any]) -> Config:
    """Build the `Config` that a TOML table spells out; derived settings are filled in.

    Raises:
        ValueError: as `load`.
    """
    if not table:
        raise ValueError("it has no settings; `python -m trainer.config NAME` prints a preset")
    sections = {key: dict(v) for key, v in table.items() if isinstance(v, Mapping)}
    for name, source in _DERIVED.items():
        section, _, key = name.partition(".")
        if key in sections.get(section, {}):
            raise ValueError(f"{name} cannot be set: it follows from {source}; set that instead")
    model, diffusion = sections.get("model", {}), sections.get("diffusion", {})
    # A file without one is told so as of any setting that is missing.
    objective = table.get("objective", "denoise")
    check_choice("objective", objective, Literal["denoise", "classify"])
    if objective == "denoise":
        model["learn_sigma"] = diffusion.get("variance", "learned") == "learned"
    if "data" in sections and "image_size" in model:
        sections["data"]["image_size"] = model["image_size"]
    kind = _DenoiseConfig if objective == "denoise" else _ClassifyConfig
    return typing.cast(Config, settings.build(kind, {**table, **sections}))


# What follows from other settings; it is not written, so that a file says each thing once.
_DERIVED = {
    f"{section}.{field.name}": field.metadata["follows"]
    for section, kind in (("model", UNetConfig), ("data", DataConfig))
    for field in settings.fields(kind, derived=True)
}


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, without those that are absent."""
    every = settings.leaves(dataclasses.asdict(config))
    return {k: v for k, v in every.items() if v is not None and k not in _DERIVED}


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as name -> (old, new)."""
    return settings.differing(flatten(old), flatten(new))


def public(config: Config) -> Config:
    """The config without credentials: what is written to the run and shown to others."""
    data = config.data
    validation = None if data.validation is None else shown(data.validation)
    mix = tuple(map(shown, data.mix))
    data = replace(data, shards=shown(data.shards), mix=mix, validation=validation)
    return replace(config, data=data)


def to_toml(config: Config) -> str:
    """The file that `load` reads back as the same config."""
    lines, section = [], ""
    for name, value in flatten(config).items():
        head, _, key = name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as a TOML file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's strings are TOML's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)
