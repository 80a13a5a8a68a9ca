"""guided-diffusion's flags of training: as settings, and what is left to a preset. No torch."""

from collections.abc import Mapping
from typing import Any, TypeVar

from trainer.adm.config import check
from trainer.config.experiment import Config
from trainer.config.sections import TrainingConfig

N = TypeVar("N", int, float)

# With the defaults of `image_train.py` and `super_res_train.py`.
_OF_NETWORKS: dict[str, Any] = {
    "lr": 1e-4,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "batch_size": 1,
    "microbatch": -1,
    "ema_rate": "0.9999",
    "schedule_sampler": "uniform",
    "use_fp16": False,
    "log_interval": 10,
    "save_interval": 10_000,
}
# With those of `classifier_train.py`. The published flags of classifiers do not say the schedule.
_OF_CLASSIFIERS: dict[str, Any] = {
    "noise_schedule": "linear",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "iterations": 150_000,
    "anneal_lr": False,
    "batch_size": 4,
    "microbatch": -1,
    "schedule_sampler": "uniform",
    "classifier_use_fp16": False,
    "log_interval": 10,
    "save_interval": 10_000,
}
#: All flags of training, with values of their types.
TYPED = {**_OF_NETWORKS, **_OF_CLASSIFIERS}
#: The flags that a setting may be from.
FLAGS_OF = {
    "training.lr": ("lr",),
    "training.weight_decay": ("weight_decay",),
    "training.batch": ("batch_size",),
    "training.micro_batch": ("microbatch", "batch_size"),
    "training.ema": ("ema_rate",),
    "training.timesteps": ("schedule_sampler",),
}
# The least values of flags that count something, from which numbers of images follow.
_LEAST = {
    "batch_size": 1,
    "iterations": 1,
    "lr_anneal_steps": 0,
    "log_interval": 1,
    "save_interval": 1,
}
# Flags that say what another says.
_ALSO = {
    "lr_anneal_steps": "anneal_lr",
    "anneal_lr": "lr_anneal_steps",
    "iterations": "lr_anneal_steps",
    "classifier_use_fp16": "use_fp16",
}


def settings(
    chosen: Mapping[str, Any], *, base: TrainingConfig, ranks: int | None
) -> dict[str, Any]:
    """The settings of `[training]` that the flags that were given mean."""
    for name, least in _LEAST.items():
        if name in chosen:
            check(chosen[name] >= least, f"--{name}", chosen[name], f"at least {least}")
    same = {"lr": "lr", "weight_decay": "weight_decay", "schedule_sampler": "timesteps"}
    found = {ours: chosen[theirs] for theirs, ours in same.items() if theirs in chosen}
    if "ema_rate" in chosen:
        found["ema"] = numbers("ema_rate", chosen["ema_rate"], kind=float)
    for name in ("use_fp16", "classifier_use_fp16"):
        if name in chosen:
            found["precision"] = "fp16" if chosen[name] else "fp32"
    return found | _clock(chosen, base=base, ranks=ranks)


def _clock(chosen: Mapping[str, Any], *, base: TrainingConfig, ranks: int | None) -> dict[str, Any]:
    """The batch, the length of the run, and what is counted in them."""
    found = dict[str, Any]()
    batch = chosen.get("batch_size", 0) * (ranks or 0) or base.batch
    if "batch_size" in chosen:
        found |= {"batch": batch, "micro_batch": chosen["batch_size"]}
        # There, the decay is of a step.
        found |= {"ema_images": batch} if base.ema_images is not None else {}
    if chosen.get("microbatch", -1) > 0:
        found["micro_batch"] = chosen["microbatch"]
    steps = chosen.get("iterations") or chosen.get("lr_anneal_steps")
    if steps or batch != base.batch:
        found["images"] = (steps or base.images // base.batch) * batch
    if {"anneal_lr", "lr_anneal_steps"} & chosen.keys():
        found["anneal"] = bool(chosen.get("anneal_lr") or chosen.get("lr_anneal_steps"))
    return found


def intervals(chosen: Mapping[str, Any], *, base: Config, batch: int) -> dict[str, int]:
    """The settings of `[intervals]`: those given, and else as many steps as in the preset."""
    names = ("log", "checkpoint", "keep_every", "samples")
    spans = {name: getattr(base.intervals, name) for name in names}
    steps = {name: span // base.training.batch for name, span in spans.items() if span is not None}
    found = {name: count * batch for name, count in steps.items()}
    given = {"log": "log_interval", "checkpoint": "save_interval"}
    return found | {ours: chosen[flag] * batch for ours, flag in given.items() if flag in chosen}


def remarks(chosen: Mapping[str, Any], *, config: Config, ranks: int | None) -> list[str]:
    """The flags that were not given, and whose defaults are not what the preset has."""
    training, intervals = config.training, config.intervals
    steps = training.images // training.batch
    defaults = _OF_CLASSIFIERS if config.objective == "classify" else _OF_NETWORKS
    is_same = training.batch == defaults["batch_size"] * (ranks or 0)
    batch = defaults["batch_size"] if is_same else f"{training.batch} for all processes"
    has = {
        "noise_schedule": config.diffusion.schedule,
        "lr": training.lr,
        "weight_decay": training.weight_decay,
        "iterations": steps,
        "anneal_lr": training.anneal,
        "lr_anneal_steps": steps if training.anneal else 0,
        "batch_size": batch,
        "ema_rate": ",".join(map(str, training.ema)),
        "schedule_sampler": training.timesteps,
        "use_fp16": training.precision == "fp16",
        "classifier_use_fp16": training.precision == "fp16",
        "log_interval": intervals.log // training.batch,
        "save_interval": intervals.checkpoint // training.batch,
    }
    return [
        f"--{name} absent: {has[name]} from the preset; there {default}"
        for name, default in defaults.items()
        if name in has and {name, _ALSO.get(name)}.isdisjoint(chosen) and has[name] != default
    ]


def numbers(name: str, text: str, *, kind: type[N]) -> tuple[N, ...]:
    """The numbers of a flag; ValueError naming it where they are none."""
    try:
        return tuple(kind(number) for number in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--{name} = {text!r}: must be numbers between commas") from None
