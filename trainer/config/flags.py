"""Coming from guided-diffusion: its command line's flags as a preset.

    python -m trainer.config --from-flags "--image_size 128 --num_channels 256 ..." [--ranks 8]

Flags that are absent have guided-diffusion's defaults where they describe the network or the
diffusion. Of the training and of a classifier's diffusion they are those of the nearest preset, and
remarks name what differs; so is what no flag says (data, samples). No torch here.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from data.config import naming
from trainer.adm.config import check
from trainer.config import settings, training_flags
from trainer.config.experiment import PRESETS, Config, from_table, load, to_toml
from trainer.config.training_flags import numbers

# Classes of every class-conditional network there.
_CLASSES = 1000
# channel_mult by image size, where the flag is absent.
_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),  # improved-diffusion's
}
_UNET = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_UPSAMPLER = {"large_size": 256, "small_size": 64}
_CLASSIFIER = {
    "image_size": 64,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
_DIFFUSION = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_learned_sigmas": False,
    # As in improved-diffusion: it means nothing with 1000 steps, and others must deny it.
    "rescale_timesteps": True,
}
#: Flags that a preset has no place for, and what there is instead.
ELSEWHERE = {
    "data_dir": "pack it first (python -m data.pack), and set data.shards",
    "val_data_dir": "pack it too (python -m data.pack), and set data.validation",
    "resume_checkpoint": "rerunning the command resumes a run; weights start one with --init",
    "eval_interval": "intervals.validate, in images",
    "fp16_scale_growth": "loss_scale_window in ds_config.json",
    "noised": "classifiers are trained on noised images",
    "timestep_respacing": "--steps of python -m trainer.sample",
    "use_ddim": "--steps ddim25 of python -m trainer.sample",
    "clip_denoised": "sampling always clips",
    "num_samples": "--images of python -m trainer.sample",
    "classifier_scale": "--scale of python -m trainer.sample",
    "classifier_path": "--classifier of python -m trainer.sample",
    "model_path": "SOURCE of python -m trainer.sample",
    "base_samples": "--low-res of python -m trainer.sample",
}
# The flags that a setting may be from, those of each kind of network.
_FLAGS_OF = {
    "model.image_size": ("large_size", "image_size"),
    "model.small_size": ("small_size",),
    "model.channels": ("num_channels", "classifier_width"),
    "model.channel_mult": ("channel_mult",),
    "model.blocks": ("num_res_blocks", "classifier_depth"),
    "model.attention": ("attention_resolutions", "classifier_attention_resolutions"),
    "model.heads": ("num_heads",),
    "model.heads_up": ("num_heads_upsample",),
    "model.head_channels": ("num_head_channels",),
    "model.dropout": ("dropout",),
    "model.pool": ("classifier_pool",),
    "diffusion.steps": ("diffusion_steps",),
    "diffusion.schedule": ("noise_schedule",),
    **training_flags.FLAGS_OF,
}
#: All flags that are known here.
NAMES = frozenset(
    {**_UNET, **_UPSAMPLER, **_CLASSIFIER, **_DIFFUSION, **training_flags.TYPED, **ELSEWHERE}
)


def to_preset(text: str, *, ranks: int | None) -> str:
    """The TOML of the preset that these flags mean, with remarks on those that have no place in it.

    Raises:
        ValueError: a flag is unknown or has a wrong value, or is of something that is not here; or
            the batch does not divide among the ranks.
    """
    given = _parse(text)
    of_classifier = [n for n in given if n.startswith("classifier_") and n not in ELSEWHERE]
    is_classifier = bool(of_classifier)
    kind = _CLASSIFIER if is_classifier else _UNET | (_UPSAMPLER if "large_size" in given else {})
    known = kind | _DIFFUSION | training_flags.TYPED
    if is_classifier and (both := [n for n in given if n in _UNET.keys() - _CLASSIFIER.keys()]):
        two = f"--{both[0]} and --{of_classifier[0]} are of two networks"
        raise ValueError(f"{two}: give the --classifier_ flags apart, with --image_size")
    for name in given:
        if name not in known and name not in ELSEWHERE:
            hint = settings.nearest(name, [*known, *ELSEWHERE])
            raise ValueError(f"--{name}: no flag of this kind of network{hint}")
    if "batch_size" in given and ranks is None:
        raise ValueError("--batch_size is of each process: say with --ranks how many there were")
    values = {**known, **{k: _typed(k, v, known[k]) for k, v in given.items() if k in known}}
    model = _classifier(values) if is_classifier else _unet(values)
    diffusion = _diffusion(values)
    chosen = {name: values[name] for name in given if name in known}
    if is_classifier:
        own = {"diffusion_steps": "steps", "noise_schedule": "schedule"}
        diffusion = {ours: diffusion[ours] for theirs, ours in own.items() if theirs in chosen}
    name, base = _nearest_preset(model, diffusion, is_classifier=is_classifier)
    training = {
        **_section(base.training),
        **training_flags.settings(chosen, base=base.training, ranks=ranks),
    }
    spans = training_flags.intervals(chosen, base=base, batch=training["batch"])
    table: dict[str, Any] = {
        "objective": base.objective,
        "model": model,
        "diffusion": {**_section(base.diffusion), **diffusion},
        "training": training,
        "data": _section(base.data),
        "intervals": _section(base.intervals) | spans,
    }
    if is_classifier or model["image_size"] != base.model.image_size:
        table["intervals"].pop("samples", None)
    remarks = [f"from guided-diffusion's flags; what they do not say is from the preset {name}"]
    with _naming_flags(known, given.keys()):
        config = from_table(table)
        if ranks is not None:
            config.training.micro_batch_on(ranks)
    remarks += training_flags.remarks(chosen, config=config, ranks=ranks)
    remarks += [f"--{name}: {ELSEWHERE[name]}" for name in given if name in ELSEWHERE]
    return "".join(f"# {remark}\n" for remark in remarks) + to_toml(config)


@contextmanager
def _naming_flags(known: Collection[str], given: Set[str]) -> Iterator[None]:
    """Add the flags, of those that are known, to the error of a setting that is from them."""
    try:
        yield
    except ValueError as error:
        said = list[str]()
        for setting in dict.fromkeys(re.findall(r"\b[a-z]+\.[a-z_]+\b", f"{error}")):
            flags = [flag for flag in _FLAGS_OF.get(setting, ()) if flag in known]
            said += [f"{setting} is --{f}" for f in flags if f in given or given.isdisjoint(flags)]
        if not said:
            raise
        raise ValueError(f"{error} ({', '.join(said)})") from None


def _parse(text: str) -> dict[str, str]:
    with naming(f"--from-flags {text!r}"):  # a quotation mark without another
        split = shlex.split(text)
    words = [p for w in split for p in (w.split("=", 1) if w[:2] == "--" else [w])]
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ValueError(f'--from-flags {text!r}: must be pairs, as in "--image_size 64 ..."')
    return {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}


def _typed(name: str, text: str, default: Any) -> Any:
    """A flag's value as the type of its default, read as guided-diffusion reads it."""
    if isinstance(default, bool):
        words = {"true": True, "t": True, "yes": True, "y": True, "1": True}
        words |= {"false": False, "f": False, "no": False, "n": False, "0": False}
        check(text.lower() in words, f"--{name}", text, "True or False")
        return words[text.lower()]
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError(f"--{name} = {text!r}: must be {type(default).__name__}") from None


def _unet(values: Mapping[str, Any]) -> dict[str, Any]:
    size = values.get("large_size", values["image_size"])
    heads = {"head_channels": values["num_head_channels"]}
    if values["num_head_channels"] == -1:
        upward = values["num_heads_upsample"]
        heads = {"heads": values["num_heads"]} | ({} if upward == -1 else {"heads_up": upward})
    return {
        "image_size": size,
        "channels": values["num_channels"],
        "channel_mult": _mult(values["channel_mult"], size=size, is_large="large_size" in values),
        "blocks": values["num_res_blocks"],
        "attention": numbers("attention_resolutions", values["attention_resolutions"], kind=int),
        **heads,
        "qkv": "new" if values["use_new_attention_order"] else "legacy",
        "resample": "biggan" if values["resblock_updown"] else "conv",
        "conditioning": "adagn" if values["use_scale_shift_norm"] else "add",
        "dropout": values["dropout"],
        "checkpoint": values["use_checkpoint"],
        **({"num_classes": _CLASSES} if values["class_cond"] else {}),
        **({"small_size": values["small_size"]} if "small_size" in values else {}),
    }


def _classifier(values: Mapping[str, Any]) -> dict[str, Any]:
    resolutions = values["classifier_attention_resolutions"]
    return {
        "image_size": values["image_size"],
        "channels": values["classifier_width"],
        "channel_mult": _mult("", size=values["image_size"], is_large=False),
        "blocks": values["classifier_depth"],
        "attention": numbers("classifier_attention_resolutions", resolutions, kind=int),
        "head_channels": 64,
        "resample": "biggan" if values["classifier_resblock_updown"] else "conv",
        "conditioning": "adagn" if values["classifier_use_scale_shift_norm"] else "add",
        "pool": values["classifier_pool"],
        "num_classes": _CLASSES,
    }


def _mult(text: str, *, size: int, is_large: bool) -> tuple[float, ...]:
    if text:
        return numbers("channel_mult", text, kind=float)
    if is_large and size >= 256:  # upsamplers to 512 have the multipliers of 256
        size = 256
    name = "--large_size" if is_large else "--image_size"
    check(size in _MULT, name, size, f"one of {sorted(_MULT)}, or give --channel_mult")
    return tuple(float(number) for number in _MULT[size])


def _diffusion(values: Mapping[str, Any]) -> dict[str, Any]:
    steps, learned = values["diffusion_steps"], values["learn_sigma"]
    is_plain = steps == 1000 or not values["rescale_timesteps"]
    expected = "1000, or --rescale_timesteps False given with it: rescaled ones are not here"
    check(is_plain, "--diffusion_steps", steps, expected)
    loss = "simple"
    if values["use_kl"]:
        loss = "vlb_rescaled"
    elif learned:
        loss = "hybrid_rescaled" if values["rescale_learned_sigmas"] else "hybrid"
    return {
        "steps": steps,
        "schedule": values["noise_schedule"],
        "predict": "x0" if values["predict_xstart"] else "eps",
        "variance": "learned" if learned else "fixed_large",
        "loss": loss,
    }


def _nearest_preset(
    model: Mapping[str, Any], diffusion: Mapping[str, Any], *, is_classifier: bool
) -> tuple[str, Config]:
    """The preset of the nearest image size that differs least in its network and diffusion.

    An upsampler's is an upsampler.
    """
    wanted = {f"model.{k}": v for k, v in model.items()}
    wanted |= {f"diffusion.{k}": v for k, v in diffusion.items()}
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    configs = {name: load(name) for name in names if not name.startswith("digits")}
    kind = "classify" if is_classifier else "denoise"

    def differences(name: str) -> tuple[int, int, str]:
        own = {f"model.{k}": v for k, v in _section(configs[name].model).items()}
        own |= {f"diffusion.{k}": v for k, v in _section(configs[name].diffusion).items()}
        count = sum(own.get(key) != wanted.get(key) for key in own.keys() | wanted.keys())
        away = abs(configs[name].model.image_size - model["image_size"])
        return away, count, name

    def is_kind(config: Config) -> bool:
        is_upsampler = getattr(config.model, "small_size", None) is not None
        return config.objective == kind and is_upsampler == ("small_size" in model)

    name = min((n for n, c in configs.items() if is_kind(c)), key=differences)
    return name, configs[name]


def _section(section: Any) -> dict[str, Any]:
    """The settings of a section that are there and are not derived from others."""
    found = {f.name: getattr(section, f.name) for f in settings.fields(section)}
    return {k: v for k, v in found.items() if v is not None}
