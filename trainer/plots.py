"""The only module that imports matplotlib: figures of the paper's form, as PNG, PDF or SVG."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data import files
from trainer.adm.config import check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Value:
    """A figure and its standard error."""

    value: float
    error: float | None = None


def check_plot(path: Path | None, *, named: str) -> None:
    """Return if a plot can be written to that path, where one is wanted.

    Raises:
        ValueError: matplotlib is missing, or the path is no picture's in a directory that exists.
    """
    if path is None:
        return
    check(path.suffix in _SUFFIXES, named, str(path), f"a file in {', '.join(_SUFFIXES)}")
    check(path.parent.is_dir(), named, str(path), "in a directory that exists")
    if not is_possible():
        raise ValueError(f"{named}: needs matplotlib: pip install matplotlib")


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def sweep(
    path: Path, points: Mapping[float, Mapping[str, Value]], *, along: str, count: str
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


def _figure(*, columns: int, height: float = 3.6) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(5.0 * columns, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    with files.whole(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=150)
