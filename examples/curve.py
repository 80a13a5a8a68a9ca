"""The loss of runs as a picture, from the rows of their `metrics.jsonl`; needs matplotlib.

python examples/curve.py OUT.png RUN [RUN ...]
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # a notebook's own may not be there
import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# An average of the loss spans so many of its rows, and this share of them.
ROWS, SHARE = 1.5, 0.03

Row = dict[str, Any]


def rows_of(run: Path) -> list[Row]:
    """The rows of a run's metrics.

    Raises:
        ValueError: it has none.
    """
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{run} is no run with metrics: {error}") from None
    if not lines:
        raise ValueError(f"{run}/metrics.jsonl is empty: train longer, or lower intervals.log")
    return [json.loads(line) for line in lines]


def column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Images seen and values of a metric, where there is one that a logarithm has."""
    found = [(row["images"], row[name]) for row in rows if (row.get(name) or 0) > 0]
    return [images for images, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """The exponential moving average of their logarithms, without a bias to the first value."""
    total = weight = 0.0
    decay = math.exp(-1 / (ROWS + SHARE * len(values)))
    means = []
    for value in values:
        total, weight = decay * total + math.log(value), decay * weight + 1
        means.append(math.exp(total / weight))
    return means


def draw(axes: Axes, run: Path, rows: list[Row]) -> None:
    """The losses of a run over the images it has seen."""
    images, losses = column(rows, "loss")
    axes.plot(images, losses, color="C0", alpha=0.35, linewidth=1, label="training")
    axes.plot(images, smoothed(losses), color="C0", label="training, smoothed")
    seen, validation = column(rows, "validation/loss")
    if seen:
        axes.plot(seen, validation, "o--", color="C1", markersize=4, label="validation (EMA)")
    axes.set(title=run.name, xlabel="images seen", ylabel="loss", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def summary(run: Path, rows: list[Row]) -> str:
    """The last values of a run, in words."""
    text = f"{run}: {rows[-1]['images']:,} images"
    shown = {
        "loss": "loss {:.4f}",
        "validation/loss": "validation loss {:.4f}",
        "validation/acc1": "validation accuracy {:.1%} over all noise levels",
        "validation/acc1/q0": "{:.1%} in the quarter of least noise",
    }
    for name, words in shown.items():
        if values := column(rows, name)[1]:
            text += ", " + words.format(values[-1])
    return text


def main() -> int:
    """Run `python examples/curve.py`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python examples/curve.py", description=__doc__)
    parser.add_argument("out", metavar="OUT.png", type=Path, help="the picture to write")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    options = parser.parse_args()
    try:
        found = {run: rows_of(run) for run in options.runs}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mpl.use("agg")
    figure = Figure(figsize=(4.5 * len(found), 3.6), layout="constrained")
    for axes, (run, rows) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        draw(axes, run, rows)
        print(summary(run, rows))
    figure.savefig(options.out, dpi=100)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
