"""The figures of one set of samples against a reference, each with its standard error."""

import dataclasses
import itertools
import json
import math
import statistics as numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from data.progress import Progress
from trainer.config.sections import FEWEST_SAMPLES
from trainer.evaluation import figures
from trainer.evaluation.extraction import PARTS, Extracted
from trainer.evaluation.figures import SPLIT, Statistics
from trainer.evaluation.reference import Reference


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error, from its values on four interleaved parts of the samples."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        return f"{self:.4g}"

    def __format__(self, form: str) -> str:
        error = "" if self.error is None else f" ± {self.error:.1g}"
        return f"{self.value:{form or '.4g'}}{error}"

    def __sub__(self, other: "Figure") -> "Figure":
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0, other.error or 0) if known else None
        return Figure(self.value - other.value, error)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures by name; a name has the number of samples, such as `fid_50k`."""

    figures: dict[str, Figure]
    warnings: list[str] = field(default_factory=list)
    #: What was compared: files with checksums, how samples were drawn, the network.
    about: dict[str, Any]

    def to_json(self) -> str:
        """The content of the .json file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def table(results: Mapping[str, Results]) -> str:
    """The figures of all samples as a table in Markdown, a row for each."""
    names = list(dict.fromkeys(name for each in results.values() for name in each.figures))
    rows = [["samples", *names], ["---"] * (1 + len(names))]
    for samples, each in results.items():
        rows.append([samples, *(str(each.figures.get(name, "")) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def short(count: int) -> str:
    """A number of images in a figure's name: 50k for 50,000, 1797 for 1,797."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def compare(
    found: Extracted,
    reference: Reference,
    *,
    labels: Sequence[int] | None,
    about: dict[str, Any],
    warnings: Sequence[str],
    say: Callable[[str], None] | None = None,
) -> Results:
    """All figures of samples against a reference; ValueError as `check_comparable`.

    `say` is called with each figure once it is known, and with the progress of those that take
    long.
    """
    check_comparable(reference, columns=found.features.shape[1])
    n = short(found.count)
    named = {}
    for name, figure in itertools.chain(
        _distances(found, reference, n=n),
        _manifold_figures(found, reference, n=n, say=say),
        _scores(found, n=n),
    ):
        named[name] = figure
        if say is not None:
            say(f"{name} {figure}")
    said = [*warnings, *_warnings(found, reference, labels=labels)]
    return Results(figures=named, warnings=said, about=about)


def check_comparable(reference: Reference, *, columns: int) -> None:
    """Return if samples with so many features per image can be compared with a reference.

    Raises:
        ValueError: it has others, or too few images.
    """
    wanted = len(reference.pool.mean)
    if columns != wanted:
        raise ValueError(
            f"{reference.name} has {wanted} features per image, this network {columns}: it was "
            "made with another network"
        )
    images = None if reference.features is None else len(reference.features)
    if images is not None and images < FEWEST_SAMPLES:
        raise ValueError(f"{reference.name} has {images} images: must be at least {FEWEST_SAMPLES}")


def _error(parts: Sequence[float]) -> float | None:
    """The standard error of a figure from its values on fourths of the samples."""
    finite = len(parts) == PARTS and all(math.isfinite(value) for value in parts)
    return numbers.stdev(parts) / math.sqrt(PARTS) if finite else None


def _distances(found: Extracted, reference: Reference, *, n: str) -> Iterator[tuple[str, Figure]]:
    """FID, and sFID where both sides have spatial features."""
    whole = reference.features
    few = found.count <= found.features.shape[1]
    if few and whole is not None and reference.count == len(whole):
        # With fewer samples than features the covariance is singular: this is exact then, too.
        exact = partial(figures.frechet_of_features, whole)
        parts = [exact(found.features[i::PARTS]) for i in range(PARTS)]
        yield f"fid_{n}", Figure(exact(found.features), _error(parts))
    else:
        yield f"fid_{n}", _distance(reference.pool, found.pool)
    if found.spatial and reference.spatial is not None:
        yield f"sfid_{n}", _distance(reference.spatial, found.spatial)


def _distance(reference: Statistics, samples: Sequence[Statistics]) -> Figure:
    device = samples[0].mean.device
    there = Statistics(reference.mean.to(device), reference.covariance.to(device))
    value, *parts = (figures.frechet_distance(there, each) for each in samples)
    return Figure(value, _error(parts))


def _manifold_figures(
    found: Extracted, reference: Reference, *, n: str, say: Callable[[str], None] | None
) -> Iterator[tuple[str, Figure]]:
    """Precision, recall and the kernel distance, where the reference has features."""
    if reference.features is None:
        return
    device = found.pool[0].mean.device
    there, here = reference.features.to(device), found.features.to(device)
    needed, shown = figures.distances_needed(len(there), len(here)), say is not None
    progress = Progress(total=needed, unit="distances of features", shown=shown, say=say)
    whole, *parts = figures.precision_recall(
        there, here, parts=PARTS, on_distances=progress.advance
    )
    for i, name in enumerate(("precision", "recall")):
        yield f"{name}_{n}", Figure(whole[i], _error([part[i] for part in parts]))
    sets = [here, *(here[i::PARTS] for i in range(PARTS))]
    total = len(sets) * figures.SUBSETS
    progress = Progress(total=total, unit="kernel distances of subsets", shown=shown, say=say)
    value, *values = (
        figures.kernel_distance(there, rows, on_subset=progress.advance) for rows in sets
    )
    yield f"kid_{n}", Figure(value, _error(values))


def _scores(found: Extracted, *, n: str) -> Iterator[tuple[str, Figure]]:
    """The inception score where the network has class scores, in splits and of all at once."""
    if found.logits is None:
        return
    parts = [figures.inception_score(found.logits[i::PARTS]) for i in range(PARTS)]
    yield f"is_{n}", Figure(figures.inception_score(found.logits), _error(parts))
    whole = figures.inception_score(found.logits, split=found.count)
    yield f"is_unsplit_{n}", Figure(whole)


def _warnings(
    found: Extracted, reference: Reference, *, labels: Sequence[int] | None
) -> Iterator[str]:
    if found.count != 50_000:
        yield (
            f"{found.count:,} samples: FID depends on their number; compare it only with figures "
            "of as many"
        )
    if 1000 * found.copies >= found.count:
        yield (
            f"{found.copies:,} of {found.count:,} samples equal an earlier one, as where ranks "
            "draw with the same seed"
        )
    if found.count < SPLIT and found.logits is not None:
        yield f"the inception score is over {found.count:,} samples instead of splits of {SPLIT:,}"
    order = torch.tensor(labels) if labels is not None and len(labels) else None
    if order is not None and order[0] != order[-1] and bool((order.diff() >= 0).all()):
        yield (
            "samples are sorted by class: splits of the inception score then hold few classes each "
            "and it is far too low; use is_unsplit"
        )
    if reference.features is None:
        yield f"{reference.name} has no images: no precision, recall and kernel distance"
