"""The command line of `python -m trainer.sample`, which `python -m launch sample` reads too.

No torch here: a login node checks the options before a job is queued.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data.exits import CommandParser, path_text
from trainer.adm.config import GuideAt, check
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.config.sections import Precision
from trainer.options import add_patience, add_ranks
from trainer.sampling.fit import check_fit

_ABOUT = """Draw images from a run's EMA or a weights file.

Image i is drawn from (seed, i) in a fixed batch, so it is the same on any number of ranks. Each
batch is put on disk when it is done, and after an interruption the same command resumes. The
result is what the ADM evaluator reads, uint8 NHWC in `arr_0` and labels in `arr_1`, or with
`--out DIR/` a directory of shards; and a PNG grid. `--upsampler` enlarges it in the same command.
"""

# The rules of `--labels`; anything else is a file.
BALANCED, RANDOM = "balanced", "random"
Pixels = Literal["round", "adm"]


def check_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that would have no effect, and for values out of range."""
    _check_values(arguments)
    guided = arguments.classifier is not None
    scale, at = arguments.scale, arguments.guide_at
    shown = scale[0] if scale and len(scale) == 1 else scale
    check(guided or scale is None, "--scale", shown, "absent without --classifier")
    preset = arguments.classifier_preset
    check(guided or preset is None, "--classifier-preset", preset, "absent without --classifier")
    ancestral = arguments.eta is None and not arguments.steps.startswith("ddim")
    has_mean = guided and ancestral
    check(at == "x_t" or has_mean, "--guide-at", at, "x_t without --classifier and for DDIM")
    for option in ("preset", "steps", "batch"):
        value = getattr(arguments, f"upsampler_{option}")
        absent = value is None or arguments.upsampler is not None
        check(absent, f"--upsampler-{option}", value, "absent without --upsampler")
    whole = arguments.share == (0, 1) or arguments.upsampler is None
    check(whole, "--share", arguments.share, "absent with --upsampler, which needs all images")


def _check_values(arguments: argparse.Namespace) -> None:
    out, eta, images = arguments.out, arguments.eta, arguments.images
    is_output = bool(re.fullmatch(r".*[^/]\.npz|.*[^/.]/+", out))
    check(is_output, "--out", out, "a file that ends in .npz, or a directory, which ends in /")
    check(images is None or images >= 1, "--images", images, "at least 1")
    check(arguments.batch >= 1, "--batch", arguments.batch, "at least 1")
    larger = arguments.upsampler_batch
    check(larger is None or larger >= 1, "--upsampler-batch", larger, "at least 1")
    fits = -(2**63) <= arguments.seed < 2**63
    check(fits, "--seed", arguments.seed, "a number of at most 63 bits")
    check(eta is None or 0 <= eta <= 1, "--eta", eta, "from 0 to 1")
    for option in ("scale", "cfg"):
        values = getattr(arguments, option) or ()
        for value in values:
            check(math.isfinite(value), f"--{option}", value, "a finite number")
        check(len(set(values)) == len(values), f"--{option}", values, "different numbers")


@dataclass(frozen=True)
class _Described:
    """A network by its config alone."""

    config: Config
    name: str


def check_inputs(arguments: argparse.Namespace) -> None:
    """Raise ValueError unless what the options name is there and fits; reads no weights.

    A config that is in the weights' file, or of a run that has not begun, is not known here.
    """
    given = vars(arguments)
    networks = {"SOURCE": "", "--classifier": "classifier_", "--upsampler": "upsampler_"}
    known: list[_Described | None] = []
    for option, prefix in networks.items():
        path, preset = given[prefix.rstrip("_") or "source"], given[f"{prefix}preset"]
        _check_there(path, option=option)
        if preset is None and path is not None and path.is_file() and path.suffix != ".safetensors":
            needed = f"--{prefix}preset".replace("_", "-")
            raise ValueError(f"{path} is no run directory; for a weights file, add {needed}")
        known.append(None if path is None else _described(path, preset))
    _check_there(arguments.low_res, option="--low-res")
    if (rule := arguments.labels) not in (BALANCED, RANDOM):
        _check_there(Path(rule), option="--labels")
    source, classifier, upsampler = known
    _check_average(arguments, source)
    others = (arguments.classifier is None, arguments.upsampler is None)
    if source is not None and (classifier is None, upsampler is None) == others:
        check_fit(arguments, source, classifier=classifier, upsampler=upsampler)


def _described(path: Path, preset: str | None) -> _Described | None:
    """The network at `path`, as far as a directory or a preset says what it is."""
    if preset is not None:
        return _Described(configs.load(preset), f"{path} (preset {preset})")
    whole = path.resolve()
    run = whole.parent.parent if whole.parent.name == "checkpoints" else whole
    file = run / "config.toml"
    return _Described(configs.load(file), str(path)) if file.is_file() else None


def _check_average(arguments: argparse.Namespace, source: _Described | None) -> None:
    decay = arguments.ema
    if decay is None:
        return
    check(not arguments.source.is_file(), "--ema", decay, "absent for a weights file")
    if source is not None and arguments.preset is None:
        kept = source.config.training.ema
        names = ", ".join(str(each) for each in kept)
        check(decay in kept, "--ema", decay, f"one that the run keeps: {names}")


def _check_there(path: Path | None, *, option: str) -> None:
    if path is not None and not path.exists():
        raise ValueError(f"{option} {path}: no such file or directory")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers, as in 0,0.5,1") from None


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    share, shares = (int(found[1]), int(found[2])) if found else (0, 0)
    if share >= shares:
        raise argparse.ArgumentTypeError(f"{text!r}: must be K/N with K from 0 to N - 1")
    return share, shares


def parser(prog: str = "python -m trainer.sample") -> argparse.ArgumentParser:
    """The command line, as of the command `prog`."""
    p = CommandParser(prog=prog, description=_ABOUT)
    add = p.add_argument
    source = "a run, one of its checkpoints, or a weights file and --preset"
    add("source", type=Path, help=source)
    add("--preset", help="the preset whose network a weights file holds (default: the run's own)")
    out = "the .npz to write, or with DIR/ a directory of shards; a .png grid goes beside it"
    add("--out", required=True, type=path_text, help=out)
    images = "images to draw (default: as many as --low-res or a file of --labels has, else 100)"
    add("--images", type=int, help=images)
    add("--batch", type=int, default=32, help="images at once on a rank (default: %(default)s)")
    steps = 'denoising steps, such as "250", "90,60,60,20,20" or "ddim25" (default: %(default)s)'
    add("--steps", default="250", help=steps)
    eta = "use DDIM with this eta (default: 0 for ddimN, and the ancestral sampler for others)"
    add("--eta", type=float, help=eta)
    classifier = "guide by this classifier, a run or a weights file (default: no guidance)"
    add("--classifier", type=Path, help=classifier)
    add(
        "--classifier-preset", help="the preset of a classifier's weights file (default: its run's)"
    )
    scale = "multiply the classifier's gradient by this; 0,0.5,1 makes three outputs (default: 1.0)"
    add("--scale", type=_numbers, help=scale)
    guide_at = "take the gradient at x_t, as published, or at the predicted mean (default: x_t)"
    add("--guide-at", choices=get_args(GuideAt), default="x_t", help=guide_at)
    cfg = "classifier-free guidance by these factors, 1 being none (default: none)"
    add("--cfg", type=_numbers, help=cfg)
    classes = "draw these classes: numbers, spans, names, or a file of them (default: all)"
    add("--classes", help=classes)
    labels = "classes in turn (balanced), at random, or those in a FILE (default: %(default)s)"
    add("--labels", default=BALANCED, metavar="balanced|random|FILE", help=labels)
    pixels = "round to grey levels, or truncate as published (adm) (default: %(default)s)"
    add("--pixels", choices=get_args(Pixels), default="round", help=pixels)
    low_res = "the samples, .npz or shards, that an upsampler enlarges (required for one)"
    add("--low-res", type=Path, help=low_res)
    upsampler = "enlarge the images by this run or weights file (default: they stay as drawn)"
    add("--upsampler", type=Path, help=upsampler)
    add("--upsampler-preset", help="the preset of its weights file (default: its run's)")
    add("--upsampler-steps", help="its denoising steps (default: as --steps)")
    add("--upsampler-batch", type=int, help="its images at once on a rank (default: as --batch)")
    add("--ema", type=float, help="which of the run's EMA decays to draw from (default: the first)")
    precision = "compute in this precision (default: as trained; fp32 on a CPU)"
    add("--precision", choices=sorted(get_args(Precision)), help=precision)
    add("--seed", type=int, default=0, help="the seed of all noise (default: %(default)s)")
    share = "draw share K, from 0, of N; the last of N processes to end makes the output of them"
    add("--share", type=_share, default=(0, 1), metavar="K/N", help=share)
    add_ranks(p, work="draw")
    add_patience(p, ends="lost")
    add("--job", type=Path, help=argparse.SUPPRESS)  # `python -m launch sample` passes it
    return p
