"""The only module that imports matplotlib: figures of the paper's form, as PNG, PDF or SVG."""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data import files
from trainer.adm.config import check
from trainer.evaluation.results import Figure, Results, short
from trainer.sampling.samplefile import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

_SUFFIXES = (".png", ".pdf", ".svg")
# What a sweep of `python -m trainer.sample` may be over, and the value that stands for none.
_OPTIONS = {"scale": 0.0, "cfg": 1.0}


def check_plot(path: Path | None) -> None:
    """Raise ValueError where `--plot` names a path to which no plot can be written."""
    if path is None:
        return
    check(path.suffix in _SUFFIXES, "--plot", str(path), f"a file in {', '.join(_SUFFIXES)}")
    files.check_parent(path, option="--plot")
    if not is_possible():
        raise ValueError("--plot: needs matplotlib: pip install matplotlib")


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def scales_of(samples: Sequence[Samples]) -> tuple[str, list[float]]:
    """The option that the samples differ in, and the value of each.

    Raises:
        ValueError: they are no sweep over one option, or do not say how they were drawn.
    """
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
    """The values of `_OPTIONS` with which samples were drawn."""
    record = samples.record
    if record is None:
        raise ValueError(f"--plot: {samples.path} does not say how it was drawn")
    found: dict[str, float] = {}
    for name, none in _OPTIONS.items():
        value = record.get(name)
        if record.get("low_res") is not None:
            # An upsampler drew them: its base was guided, and only the name has the base's value.
            value = _named(samples.path, name)
        found[name] = none if value is None else float(value)
    return found


def _named(path: Path, option: str) -> str | None:
    """The option's value at the end of the name of a sweep's output: samples-scale0.5.npz."""
    found = re.findall(rf"-{option}(-?[0-9.]+(?:e[-+]?[0-9]+)?)(?=-|\.npz$|$)", path.name)
    return found[-1] if found else None


def sweep(path: Path, results: Mapping[float, Results], *, option: str, count: int) -> None:
    """Precision and recall, FID and the inception score against a scale: the paper's Figure 4.

    `results` are by the value of the `option` that the samples differ in, "scale" or "cfg"; each is
    of `count` samples.
    """
    points = sorted(results.items())
    along = {"scale": "scale of the classifier's gradient", "cfg": "classifier-free guidance"}
    title, n = f"{count:,} samples", short(count)
    picture = _figure(columns=2)
    left, right = picture.subplots(1, 2)

    def line(axes: "Axes", name: str, label: str, color: str) -> None:
        scales = [scale for scale, _ in points]
        figures = [each.figures[f"{name}_{n}"] for _, each in points]
        values = [figure.value for figure in figures]
        errors = [figure.error or 0.0 for figure in figures]
        axes.errorbar(scales, values, errors, label=label, color=color, marker="o", capsize=2)
        axes.set_xlabel(along[option])

    there = points[0][1].figures
    if f"precision_{n}" in there:
        line(left, "precision", "precision", "C0")
        line(left, "recall", "recall", "C1")
        left.set_ylim(0, 1)
        left.legend()
    left.set_title(title)
    line(right, "fid", "FID", "C2")
    right.set_ylabel("FID (lower is better)")
    handles, labels = right.get_legend_handles_labels()
    if f"is_{n}" in there:
        other = right.twinx()
        line(other, "is", "IS", "C3")
        other.set_ylabel("inception score (higher is better)")
        more = other.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    right.legend(handles, labels)
    right.set_title(title)
    _save(picture, path)


@dataclass(frozen=True)
class Bar:
    """A row of an ablation, as the picture shows it."""

    name: str
    #: The row that it is compared with; empty if other rows are compared with it.
    against: str
    #: The difference to that row, or where there is none the figure; None if not known yet.
    figure: Figure | None


def ablation(
    path: Path,
    bars: Sequence[Bar],
    *,
    figure: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """A bar for each row: its difference to the row that it is compared with, as in Tables 1 to 3.

    Beside them FID against images seen, if there are `curves` by row.
    """
    picture = _figure(columns=1 + bool(curves), height=1.5 + 0.35 * len(bars))
    axes = list(picture.subplots(1, 1 + bool(curves), squeeze=False)[0])
    left = axes[0]
    for place, bar in enumerate(bars):
        if bar.figure is not None and bar.against:
            value, error = bar.figure.value, bar.figure.error
            left.barh(place, value, xerr=error, color="C2" if value <= 0 else "C3", capsize=2)
    first = bars[0].name
    left.set_yticks(range(len(bars)), [_label(bar, first=first) for bar in bars])
    left.set_ylim(len(bars) - 0.4, -0.6)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel(f"difference in {figure} (below 0: better)")
    for axis in axes[1:]:
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_xlabel("images seen")
        axis.set_ylabel("FID in training (intervals.evaluate)")
        axis.legend(fontsize="small")
    _save(picture, path)


def _label(bar: Bar, *, first: str) -> str:
    """The label of a row: its name, and what its bar does not show."""
    if bar.figure is None:
        return f"{bar.name} (not done yet)"
    if not bar.against:
        return f"{bar.name} ({bar.figure.value:.4g})"
    return bar.name if bar.against == first else f"{bar.name} (against {bar.against})"


def _figure(*, columns: int, height: float = 3.6) -> "Picture":
    # A notebook names one for its cells to all that it starts, and it may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure as Picture

    return Picture(figsize=(5.0 * columns, height), layout="constrained")


def _save(figure: "Picture", path: Path) -> None:
    files.make_parent(path, option="--plot")
    with files.whole(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=150)
