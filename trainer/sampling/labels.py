"""The class of each drawn image: in turn, at random, from a file, or its low-res image's.

Labels are a pure function of the image's index, so they do not depend on ranks or interruptions.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import files
from data.config import naming
from trainer.adm import keyed
from trainer.config.settings import nearest
from trainer.sampling.options import BALANCED, RANDOM

# The rule where each image has the class of its low-resolution image.
LOW_RES = "low-res"

Names = Callable[[], Sequence[str]]
"""Reads the names of the classes, by number; ValueError where they are not known."""
Numbers = Callable[[], Mapping[str, int] | ValueError]
"""The numbers of the classes by name, or the error that says why they are not known."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Which class each image is drawn of.

    `rule` is "balanced" (`classes` in turn), "random" (each by a draw of its own, as for the
    paper's tables), "low-res", or "sha256:..." of the labels in a file; the latter two have `given`
    (N,) instead of `classes`.
    """

    rule: str
    classes: tuple[int, ...] | None = None
    given: NDArray[np.int64] | None = None
    seed: int = 0

    def of(self, indices: Tensor) -> Tensor:
        """The classes (B,) of image indices (B,), on the CPU."""
        if self.given is not None:
            return torch.from_numpy(self.given)[indices]
        assert self.classes is not None
        choice = indices % len(self.classes)
        if self.rule == RANDOM:
            u = keyed.uniform(indices, seed=self.seed, stream=keyed.SAMPLE_LABEL)
            choice = (u.double() * len(self.classes)).long()
        return torch.tensor(self.classes)[choice]


def choose(
    *,
    rule: str,
    classes: str | None,
    low_res: NDArray[np.int64] | None,
    count: int | None,
    enlarges: bool,
    names: Names,
    seed: int,
) -> Labels | None:
    """The labels that `--labels` and `--classes` ask for, among `count` classes; None for none.

    `low_res` (N,) are the labels of the images to enlarge; `enlarges` says that there are such
    images, which may have no labels.

    Raises:
        ValueError: a class that does not exist, options that contradict each other or the images,
            or images to enlarge without labels and no `--classes` or `--labels` for them.
    """
    chosen = classes is not None or rule != BALANCED
    option = "--labels" if classes is None else "--classes"
    if low_res is not None:
        if chosen:
            raise ValueError(f"{option}: must be absent where the --low-res images have labels")
        return Labels(rule=LOW_RES, given=_checked(low_res, count, option="--low-res"))
    if count is None:
        if chosen:
            raise ValueError(f"{option}: the network has no classes and there is no --classifier")
        return None
    if enlarges and not chosen:
        raise ValueError(
            "--low-res images have no labels, and the network has classes: give theirs by "
            "--labels FILE, or one for all by --classes"
        )
    if rule not in (BALANCED, RANDOM):
        if classes is not None:
            raise ValueError("--classes: must be absent where --labels is a file")
        found = read_labels(Path(rule), count=count, names=_numbers(names))
        given = _checked(found, count, option="--labels")
        return Labels(rule=f"sha256:{hashlib.sha256(given.tobytes()).hexdigest()}", given=given)
    numbers: Sequence[int] = range(count)
    if classes is not None:
        numbers = class_numbers(classes, count=count, names=_numbers(names))
    known = _checked(np.array(numbers), count, option="--classes")
    return Labels(rule=rule, classes=tuple(known.tolist()), seed=seed)


def _numbers(names: Names) -> Numbers:
    """`names` as numbers by name; read at the first call, once for all lines of a file."""

    @cache
    def found() -> Mapping[str, int] | ValueError:
        try:
            return {name: i for i, name in enumerate(names())}
        except ValueError as error:
            return error

    return found


def class_numbers(text: str, *, count: int, names: Numbers) -> Sequence[int]:
    """The numbers of the classes in "0-9,207,n01440764", or in a file of such lines.

    Names may have commas where they have a line of their own. Spans are of numbers; "3-3" is class
    3 where "3" is also the name of another class.

    Raises:
        ValueError: a word is neither a number, nor a span of numbers, nor the name of a class, or
            it is the number of one class and the name of another.
    """
    if os.path.isfile(text):  # Path.is_file raises an error where a name is long
        text = _text(Path(text), option="--classes")
    words = [word for line in text.splitlines() for word in _words(line.strip(), names)]
    numbers: list[int] = []
    for word in filter(None, words):
        if span := re.fullmatch(r"(\d+)-(\d+)", word):
            first, last = int(span[1]), int(span[2])
            if not first <= last < count:
                raise ValueError(
                    f"--classes {word}: must be a span of the classes 0 to {count - 1}"
                )
            numbers += range(first, last + 1)
        else:
            with naming("--classes"):
                numbers.append(_number(word, count=count, names=names))
    if not numbers:
        raise ValueError(f"--classes {text[:40]!r}: must name a class, as in --classes 0-9,207")
    return numbers


def read_labels(path: Path, *, count: int, names: Numbers) -> NDArray[Any]:
    """The labels (N,) in a file: a class on each line, an `.npy`, or `arr_1` of an `.npz`.

    They are integers of any type, not yet checked to be below `count` where they are an array.

    Raises:
        ValueError: it is missing, empty, or something else.
    """
    if not path.is_file():
        raise ValueError(f"--labels {path}: must be balanced, random or a file of labels")
    labels: NDArray[Any]
    if path.suffix in (".npy", ".npz"):
        labels = _array(path)
    else:
        lines = _text(path, option="--labels").rstrip().splitlines()
        if "" in (stripped := [line.strip() for line in lines]):
            raise ValueError(f"--labels {path}: line {stripped.index('') + 1} is empty")
        with naming(f"--labels {path}"):
            numbers = [_number(line, count=count, names=names) for line in stripped]
        labels = np.array(numbers, np.int64)
    if not len(labels):
        raise ValueError(f"--labels {path}: has no labels; it must have one for each image")
    return labels


def _array(path: Path) -> NDArray[Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        labels = np.asarray(loaded if path.suffix == ".npy" else loaded["arr_1"])
    except Exception as error:  # numpy and zipfile raise errors of many types for other files
        raise ValueError(f"--labels {path} is not readable: {files.reason(error)}") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"--labels {path}: labels are {labels.dtype} {labels.shape}, not integers (N,)"
        )
    return labels


def columns(labels: NDArray[np.int64] | None) -> int | None:
    """The period of the labels, up to 20: with so many columns, each column is of one class.

    None where they have no such period, or are all equal.
    """
    if labels is None or (labels == labels[0]).all():
        return None
    fitting = (n for n in range(2, min(21, len(labels))) if (labels[n:] == labels[:-n]).all())
    return next(fitting, None)


def _words(line: str, names: Numbers) -> list[str]:
    if "," in line and re.search(r"[^\d,\s-]", line):
        known = names()
        if not isinstance(known, ValueError) and line in known:
            return [line]
    return [word.strip() for word in line.split(",")]


def _number(word: str, *, count: int, names: Numbers) -> int:
    """The class, of `count`, whose number or name a word is; ValueError for neither or two."""
    is_number = bool(re.fullmatch(r"-?\d+", word))
    # Longer ones are in no range, and Python refuses to convert very long ones.
    number = int(word) if is_number and len(word) < 20 else -1
    in_range = 0 <= number < count
    known = names()
    if isinstance(known, ValueError):
        if not is_number:
            raise known
        known = {}
    named = known.get(word, number)
    if not in_range and word in known:
        return named
    if named != number:
        raise ValueError(
            f"{word} is the number of one class and the name of class {named}: write "
            f"{number}-{number} or {named}-{named} in --classes, and a file of --labels as an .npy"
        )
    if in_range:
        return number
    if is_number:
        raise ValueError(f"{word} is not among the classes 0 to {count - 1}")
    first = ", ".join([*known][:5]) + (", ..." if len(known) > 5 else "")
    hint = nearest(word, [*known]) or f"; the classes are {first}"
    raise ValueError(f"{word!r} is not a class{hint}")


def _checked(labels: NDArray[Any], count: int | None, *, option: str) -> NDArray[np.int64]:
    wrong = labels[(labels < 0) | (labels >= count)] if count is not None else labels[:0]
    if len(wrong):
        raise ValueError(f"{option}: {wrong[0]} is not among the classes 0 to {(count or 0) - 1}")
    return labels.astype(np.int64)


def _text(path: Path, *, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {path} is not readable: {files.reason(error)}") from None
