"""The only module that imports matplotlib: figures of the paper's form, as PNG, PDF or SVG."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data import files
from trainer.adm.config import check
from trainer.evaluation.results import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

_SUFFIXES = (".png", ".pdf", ".svg")


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


def sweep(
    path: Path, points: Mapping[float, Mapping[str, Figure]], *, along: str, count: str
) -> None:
    """Precision and recall, FID and the inception score against a scale: the paper's Figure 4.

    `points` has each scale's figures by name; `count` says of how many samples.
    """
    figure = _figure(columns=2)
    left, right = figure.subplots(1, 2)
    at = sorted(points)

    def line(axes: "Axes", name: str, label: str, color: str) -> None:
        found = [points[x][name] for x in at]
        values = [each.value for each in found]
        errors = [each.error or 0.0 for each in found]
        axes.errorbar(at, values, errors, label=label, color=color, marker="o", capsize=2)
        axes.set_xlabel(along)

    first = points[at[0]]
    if "precision" in first:
        line(left, "precision", "precision", "C0")
        line(left, "recall", "recall", "C1")
        left.set_ylim(0, 1)
        left.legend()
    left.set_title(f"{count} samples")
    line(right, "fid", "FID", "C2")
    right.set_ylabel("FID (lower is better)")
    handles, labels = right.get_legend_handles_labels()
    if "is" in first:
        other = right.twinx()
        line(other, "is", "IS", "C3")
        other.set_ylabel("inception score (higher is better)")
        more = other.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    right.legend(handles, labels)
    right.set_title(f"{count} samples")
    _save(figure, path)


@dataclass(frozen=True)
class Bar:
    """A row of an ablation."""

    name: str
    #: The row that it is compared with; empty for one that others are compared with.
    against: str
    #: The difference, or the figure of a row without one; None if it is not known yet.
    figure: Figure | None


def ablation(
    path: Path,
    bars: Sequence[Bar],
    *,
    figure: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Rows as differences to the rows that they are compared with, as in Tables 1 to 3.

    Beside them FID against images, where there are `curves` by row.
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
    """A row's name, and what its bar does not say."""
    if bar.figure is None:
        return f"{bar.name} (not done yet)"
    if not bar.against:
        return f"{bar.name} ({bar.figure.value:.4g})"
    return bar.name if bar.against == first else f"{bar.name} (against {bar.against})"


def _figure(*, columns: int, height: float = 3.6) -> "Picture":
    from matplotlib.figure import Figure as Picture

    return Picture(figsize=(5.0 * columns, height), layout="constrained")


def _save(figure: "Picture", path: Path) -> None:
    files.make_parent(path, option="--plot")
    with files.whole(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=150)
