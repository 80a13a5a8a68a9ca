"""What came of `python -m bench.paper`: a table in Markdown and JSON, and grids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from bench.paper_plan import Plan
from data import files
from examples.judge_digits import recognised
from trainer.sampling.samplefile import open_samples

_FIGURES = ("fid", "precision", "recall", "kid")
# Rows of the digits' grid.
_SHOWN = (
    ("unconditional-scale0", "unconditional"),
    ("conditional-scale0", "conditional"),
    ("conditional-scale2", "classifier, scale 2"),
    ("conditional-scale8", "classifier, scale 8"),
    ("free-cfg2", "classifier-free, 2"),
    ("250-scale2", "250 steps, scale 2"),
)


def judge() -> SVC:
    """The independent classifier of the quickstart, which sees pixels and no features."""
    pixels, labels = load_digits(return_X_y=True)
    return SVC(gamma=0.001).fit(pixels, labels)


def rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each evaluated sample file; figures have their N and standard error."""
    known, found = judge(), []
    digits = plan.digits()
    for each in [*digits, *plan.photos()]:
        stored = json.loads(each.figures.read_text())
        figures = {name.rpartition("_")[0]: value for name, value in stored["figures"].items()}
        row: dict[str, Any] = {
            "file": each.path.stem,
            "network": each.network,
            "guidance": each.guidance,
            "steps": each.steps,
            "factor": each.factor,
            "images": stored["about"]["samples"]["count"],
            "recognised": recognised(known, each.path) if each in digits else None,
        }
        found.append(row | {name: figures[name] for name in _FIGURES})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown; ± is the standard error over fourths of the images."""
    names = ["network", "guidance", "steps", "recognised", "FID", "precision", "recall", "KID"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in found:
        share = "" if row["recognised"] is None else f"{row['recognised']:.1%}"
        cells = [row["network"], row["guidance"], row["steps"], share]
        cells += [f"{row[n]['value']:.4g} ± {row[n]['error']:.1g}" for n in _FIGURES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(plan: Plan, *, about: dict[str, Any]) -> str:
    """Write table.md, table.json, digits.png and photos.png; returns the table."""
    found = rows(plan)
    text = table(found)
    files.write(plan.out / "table.md", text)
    files.write(plan.out / "table.json", json.dumps({**about, "rows": found}, indent=1) + "\n")
    _draw_digits(plan)
    _draw_photos(plan)
    return text


def _draw_digits(plan: Plan) -> None:
    shown = {}
    for stem, title in _SHOWN:
        shown[title] = open_samples(plan.samples(stem)).images(0, 20)
    digits = load_digits()
    real = np.concatenate([np.flatnonzero(digits.target == i)[:2] for i in range(10)])
    real = real.reshape(10, 2).T.flatten()
    gray = (digits.images[real] / 16 * 255).round().astype(np.uint8)
    shown["real"] = gray[..., None].repeat(3, axis=3)
    _draw_grid(shown, plan.out / "digits.png")


def _draw_photos(plan: Plan) -> None:
    base = plan.samples("two-stages").with_name("two-stages-base.npz")
    shown = {
        "8 px, drawn": open_samples(base),
        "enlarged: two stages": open_samples(plan.samples("two-stages")),
        "8 px real, bilinear": open_samples(plan.samples("bilinear")),
        "8 px real, upsampler": open_samples(plan.samples("enlarged")),
        "real": open_samples(plan.out / "photos16"),
        "one stage": open_samples(plan.samples("one-stage")),
    }
    pixels = {title: samples.images(0, 20) for title, samples in shown.items()}
    _draw_grid(pixels, plan.out / "photos.png")


def _draw_grid(shown: dict[str, NDArray[np.uint8]], path: Path) -> None:
    """A line of images for each title; uint8 (N, H, W, 3)."""
    size, gap, margin = 32, 2, 190
    count = max(len(images) for images in shown.values())
    step = size + gap
    grid = Image.new("RGB", (margin + count * step, len(shown) * (step + 2 * gap)), "white")
    for line, (title, images) in enumerate(shown.items()):
        top = line * (step + 2 * gap)
        ImageDraw.Draw(grid).text((6, top + size // 3), title, fill="black")
        for i, image in enumerate(images):
            large = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            grid.paste(large, (margin + i * step, top))
    grid.save(path)
