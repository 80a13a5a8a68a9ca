"""The results of a set's rows: tables, a picture, and an entry in TensorBoard's tab HParams."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import files
from trainer.ablations.sets import AblationSet, Row
from trainer.config import experiment as configs
from trainer.evaluation import plots
from trainer.evaluation.plots import Bar
from trainer.evaluation.results import Figure
from trainer.run import history
from trainer.watch import tensorboard

# The figures of each row that is evaluated, by the names of row and figure.
_Figures = dict[str, dict[str, Figure]]


def write(found: AblationSet, *, runs: Path, say: Callable[[str], None]) -> None:
    """Write the results of the rows that are evaluated into `runs`."""
    figures = _figures(found, runs=runs)
    files.write(runs / "table.md", _table(found, figures))
    files.write(runs / "table.csv", _csv(figures))
    if not figures:
        return
    tensorboard.hparams(runs / "hparams", _hparams(found, figures))
    if plots.is_possible():
        bars, name = _bars(found, figures)
        plots.ablation(runs / "plot.png", bars, figure=name, curves=_curves(found, runs=runs))
    else:
        say("no plot.png: it needs matplotlib (pip install matplotlib)")


def _figures(found: AblationSet, *, runs: Path) -> _Figures:
    there = {row.name: runs / row.directory / "figures.json" for row in found.rows}
    stored = {row: json.loads(path.read_text()) for row, path in there.items() if path.exists()}
    return {
        row: {name: Figure(**figure) for name, figure in each["figures"].items()}
        for row, each in stored.items()
    }


def _table(found: AblationSet, figures: _Figures) -> str:
    """The rows in Markdown: the difference to the row that each is compared with, or the figure.

    Figures' names end in the number of samples; ± is the standard error.
    """
    names = list(next(iter(figures.values()), {}))
    lines = [f"| {' | '.join(['row', 'against', *names])} |", f"|{'---|' * (2 + len(names))}"]
    for row in found.rows:
        own, against = figures.get(row.name), _against(found, row)
        base = figures.get(against, {})
        cells = ["not done yet" if own is None else _cell(own.get(n), base.get(n)) for n in names]
        lines.append(f"| {' | '.join([row.name, against, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(figure: Figure | None, base: Figure | None) -> str:
    if figure is None:
        return "-"
    return str(figure) if base is None else f"{figure - base:+.3g}"


def _csv(figures: _Figures) -> str:
    """The figures themselves, one line for each row and figure."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["row", "figure", "value", "error"])
    for row, each in figures.items():
        writer.writerows([row, name, f.value, f.error] for name, f in each.items())
    return out.getvalue()


def _against(found: AblationSet, row: Row) -> str:
    """The row that a row is compared with; "" if other rows are compared with it."""
    first = found.rows[0].name
    bases = {each.against or first for each in found.rows}
    return "" if row.name in bases else (row.against or first)


def _bars(found: AblationSet, figures: _Figures) -> tuple[list[Bar], str]:
    """The difference of each row to the one that it is compared with, in the first figure."""
    name = next(iter(next(iter(figures.values()))))
    bars = []
    for row in found.rows:
        own = figures.get(row.name, {}).get(name)
        against = _against(found, row)
        base = figures.get(against, {}).get(name)
        if own is not None and against:
            own = None if base is None else own - base
        bars.append(Bar(row.name, against, own))
    return bars, name


def _curves(found: AblationSet, *, runs: Path) -> dict[str, list[tuple[int, float]]]:
    """FID in training against images seen, of the rows with `intervals.evaluate`."""
    curves = {}
    for row in found.rows:
        points = {
            values["images"]: value
            for values in history.read(runs / row.directory / "run")
            for name, value in values.items()
            if name.startswith("evaluation/fid_") and value is not None
        }
        if points:
            curves[row.name] = sorted(points.items())
    return curves


def _hparams(
    found: AblationSet, figures: _Figures
) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """By row, the settings in which the rows differ, and its figures."""
    flat = {row.name: configs.flatten(found.config(row)) for row in found.rows}
    names = sorted({name for each in flat.values() for name in each})
    differing = [n for n in names if len({repr(each.get(n)) for each in flat.values()}) > 1]
    return {
        row.directory: (
            {"row": row.name, **{name: flat[row.name].get(name) for name in differing}},
            {name: figure.value for name, figure in figures[row.name].items()},
        )
        for row in found.rows
        if row.name in figures
    }
