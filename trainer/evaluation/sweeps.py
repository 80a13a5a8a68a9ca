"""Samples of a sweep over scales: what they differ in, and their figure."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.evaluation import plots
from trainer.evaluation.results import Results, short
from trainer.sampling.samplefile import Samples

# What a sweep of `python -m trainer.sample` may be over, and what stands for none.
_OPTIONS = {"scale": 0.0, "cfg": 1.0}


def scales_of(samples: Sequence[Samples]) -> tuple[str, list[float]]:
    """The option that the samples differ in, and its value for each; ValueError for no one plot."""
    counts = {each.count for each in samples}
    if len(counts) > 1:
        raise ValueError(f"--plot: samples of different numbers, {sorted(counts)}: draw as many")
    drawn = [_drawn(each) for each in samples]
    differing = [name for name in _OPTIONS if len({each[name] for each in drawn}) > 1]
    if len(differing) != 1:
        found = "both" if differing else "neither"
        raise ValueError(f"--plot: the samples must differ in --scale or in --cfg: {found} differ")
    values = [each[differing[0]] for each in drawn]
    if len(set(values)) < len(values):
        raise ValueError(f"--plot: two of the samples have the same --{differing[0]}")
    return differing[0], values


def _drawn(samples: Samples) -> Mapping[str, float]:
    """The value of each option."""
    record = samples.record
    if record is None:
        raise ValueError(f"--plot: {samples.path} does not say how it was drawn")
    found: dict[str, float] = {}
    for name, none in _OPTIONS.items():
        value = record.get(name)
        if record.get("low_res") is not None:
            # It was enlarged: the guidance was that of its base, which its name tells.
            value = _named(samples.path, name)
        found[name] = none if value is None else float(value)
    return found


def _named(path: Path, option: str) -> str | None:
    """The value that the name of a sweep's output gives: samples-scale0.5.npz."""
    found = re.search(rf"-{option}([0-9.]+(?:e[-+]?[0-9]+)?)(?:-|\.npz$|$)", path.name)
    return found[1] if found else None


def plot(path: Path, results: Mapping[float, Results], *, option: str, count: int) -> None:
    """Write the figure: precision and recall, FID and inception score against the scale."""
    n = short(count)
    points = {
        scale: {name.removesuffix(f"_{n}"): figure for name, figure in each.figures.items()}
        for scale, each in results.items()
    }
    along = {"scale": "scale of the classifier's gradient", "cfg": "classifier-free guidance"}
    plots.sweep(path, points, along=along[option], count=f"{count:,}")
