"""What a source contains: the names of its images, their labels, and the names of the labels."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.manifest import NO_CLASS
from data.packing.labels import MOST_CLASSES, Label, all_or_no_labels
from data.packing.names import composed, first_of

# Class names that are numbers below this are sorted by value; larger numbers are dates etc.
_MOST_NUMBERED = 65536
_NUMBER = re.compile(r"-?\d+")
# Kinds of skipped files that messages name.
_KINDS = 12


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All images of a source: their names there, their labels, and the names of the labels."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    #: The files that are no images, counted by kind.
    skipped: Mapping[str, int] = field(default_factory=dict)
    #: Why the labels cannot be used, or ""; a class map replaces them.
    fault: str = ""
    #: Whether the source gives the labels as numbers, not as names.
    is_numbered: bool = False

    @property
    def skipped_by_kind(self) -> str:
        """How many files were skipped, such as `4 skipped (.txt 3, .mat 1)`."""
        kinds = sorted(self.skipped.items(), key=lambda kind: (-kind[1], kind[0]))
        listed = [f"{name} {count}" for name, count in kinds[:_KINDS]]
        more = ["..."] if len(kinds) > _KINDS else []
        text = f" ({', '.join([*listed, *more])})" if kinds else ""
        return f"{sum(self.skipped.values())} skipped{text}"

    def check_labels(self, where: str) -> None:
        """Raise ValueError, naming an image, unless each label is the number of a class."""
        count = len(self.classes)
        for label in (min(self.labels), max(self.labels)) if self.labels else ():
            if not 0 <= label < count:
                wanted = f"below {count}, which is all class names"
                if label < 0:
                    negative = sum(label < 0 for label in self.labels)
                    wanted = (
                        f"at least 0; those of {negative} of {len(self.labels)} images are not, as "
                        "in a test set without labels: leave these out, or add --class-map"
                    )
                name = self.names[self.labels.index(label)]
                raise ValueError(f"{where}: {name} has the label {label}: must be {wanted}")


def by_directory_name(names: list[str], classes: list[str]) -> Listing:
    """A listing from the name of each image's class; label i is the i-th name in sorted order.

    Names that are the numbers 0 to N - 1 are the labels themselves. Other numbers, such as years,
    are names that are sorted by value.
    """
    known = {*classes}
    if not all(_NUMBER.fullmatch(name) and int(name) < _MOST_NUMBERED for name in known):
        return _in_order(names, classes, sorted(known))
    if {int(name) for name in known} == {*range(len(known))}:
        return by_number(names, [int(name) for name in classes])
    return _in_order(names, classes, sorted(known, key=int))


def _in_order(names: list[str], classes: list[str], ordered: list[str]) -> Listing:
    """A listing in which label i is the i-th of the names in `ordered`."""
    label = {name: i for i, name in enumerate(ordered)}
    return Listing(names=names, labels=[label[c] for c in classes], classes=tuple(ordered))


def by_number(names: list[str], labels: list[int]) -> Listing:
    """A listing with these labels; the name of each class is its number.

    Raises:
        ValueError: one is too large for the number of a class.
    """
    if (most := max(labels, default=0)) >= MOST_CLASSES:
        raise ValueError(
            f"{names[labels.index(most)]} has the label {most}: must be the number of a class, "
            f"below {MOST_CLASSES}"
        )
    classes = tuple(str(i) for i in range(max(labels, default=-1) + 1))
    return Listing(names=names, labels=labels, classes=classes)


def without_labels(names: list[str]) -> Listing:
    """A listing of images that have no labels."""
    return Listing(names=names, labels=[0] * len(names), classes=(NO_CLASS,))


def by_label_if_any(names: list[str], labels: list[Label | None]) -> Listing:
    """As `by_number` or, for names, in sorted order; without classes if no image has a label.

    Raises:
        ValueError: only some images have a label, or they are numbers and names.
    """
    known = all_or_no_labels(names, labels)
    if known is None:
        return without_labels(names)
    numbers = [label for label in known if isinstance(label, int)]
    if numbers:
        return replace(by_number(names, numbers), is_numbered=True)
    classes = [*map(str, known)]
    return _in_order(names, classes, sorted({*classes}))


def renumber(listing: Listing, *, classes: tuple[str, ...]) -> Listing:
    """Number the classes as another dataset does, e.g. a validation split as its training split.

    Numbers mean the other dataset's names if those are numbers too, otherwise its labels.

    Raises:
        ValueError: a class that the other one does not have, or images without a label.
    """
    if NO_CLASS in listing.classes:
        raise ValueError("--classes-of: some images have no label; add --class-map")
    are_numbers = all(name.isdecimal() for name in listing.classes)
    if are_numbers and listing.is_numbered and len(listing.classes) <= len(classes):
        return replace(listing, classes=classes)
    used = [listing.classes[label] for label in sorted({*listing.labels})]
    number = _numbers(classes, of_numbers=are_numbers)
    unknown = [name for name in used if _key(name, are_numbers) not in number]
    if unknown:
        few = first_of(classes, 3)
        # Those of ILSVRC2012_validation_ground_truth.txt, where less 1 would be another class.
        hint = "; numbers from 1 may count in another order, as ImageNet's own do: give names"
        from_one = are_numbers and unknown == [str(len(classes))]
        raise ValueError(
            f"--classes-of has no class {unknown[0]!r} ({len(unknown)} are unknown): must be a "
            f"name or label of its classes, which are {few} (0 to {len(classes) - 1})"
            f"{hint if from_one else ''}"
        )
    labels = [number[_key(listing.classes[label], are_numbers)] for label in listing.labels]
    return replace(listing, labels=labels, classes=classes)


def warn_of_empty_classes(
    classes: tuple[str, ...], labels: Iterable[int], *, source: str | Path
) -> None:
    """Say which classes have no image: 0 where numbers count from 1, or those of other files."""
    empty = [classes[label] for label in sorted({*range(len(classes))} - {*labels})]
    if 0 < len(empty) < len(classes):
        hint = "; numbers are labels from 0: data.pack --class-map gives others"
        print(
            f"SOURCE = {source}: {len(empty)} of {len(classes)} classes have no image "
            f"({first_of(empty)}): a network never learns them, and draws them where --classes "
            f"is absent{hint if empty[0].isdecimal() else ''}",
            file=sys.stderr,
        )


def _numbers(classes: tuple[str, ...], *, of_numbers: bool) -> dict[str, int]:
    """The label of each class, by its name; with `of_numbers`, without leading zeros.

    If the classes have other names than numbers, the numbers are the labels.
    """
    if of_numbers and not all(name.isdecimal() for name in classes):
        return {str(i): i for i in range(len(classes))}
    return {_key(name, of_numbers): i for i, name in enumerate(classes)}


def _key(name: str, is_number: bool) -> str:
    return str(int(name)) if is_number else composed(name)
