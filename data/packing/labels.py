"""Labels in files that others made: the number of a class, or its name."""

import json
import re
from collections.abc import Mapping, Sequence

Label = int | str

# The keys and columns that hold a label, in the order in which they are preferred.
LABEL_KEYS = ("label", "cls", "class_id", "class")

# Labels below this are class numbers; larger numbers are ids, dates and the like.
MOST_CLASSES = 1 << 20

# A class number; as 3.0 too, which pandas writes if a value of the column is missing.
_WHOLE = re.compile(r"(-?\d+)(\.0*)?")
_NUMBERS = re.compile(r"[-+\d.,\s]+")
_WORD = re.compile(r"[\w-]+")


def label_of(value: object, *, where: str) -> Label:
    """A label from a value of JSON or a table: a number without a fraction, or a name.

    Raises:
        ValueError: it is anything else, such as a number written as text.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _is_name(value):
        return value.strip()
    raise ValueError(f"{where} = {str(value)[:40]!r}: must be a class number or a class name")


def text_label(content: bytes, *, where: str) -> Label:
    """The label in a `.cls` file.

    Raises:
        ValueError: it is neither a number without a fraction nor a name.
    """
    text = content.decode("utf-8", "replace").strip()
    if re.fullmatch(r"[-+]?\d+", text):  # `int` takes 2019_05, too
        return int(text)
    try:
        return label_of(float(text) if _NUMBERS.fullmatch(text) else text, where=where)
    except ValueError:
        raise ValueError(
            f"{where} = {content[:20]!r}: must be a class number or a class name"
        ) from None


def json_label(content: bytes, *, where: str) -> Label | None:
    """The label in a `.json` file; None if it has none.

    Raises:
        ValueError: it is not JSON, or its label is neither a number nor a name.
    """
    try:
        found = json.loads(content)
    except ValueError:
        raise ValueError(
            f"{where} = {content[:20]!r}: must be a class number, or JSON that holds one"
        ) from None
    if isinstance(found, Mapping):
        key = next((key for key in LABEL_KEYS if found.get(key) is not None), None)
        return label_of(found[key], where=f"{where}: {key}") if key else None
    return None if found is None or isinstance(found, list) else label_of(found, where=where)


def word_label(content: bytes) -> Label | None:
    """The label in a `.txt` file, if it is one word; longer texts are captions."""
    word = content.decode("utf-8", "replace").strip()
    if not _WORD.fullmatch(word):
        return None
    return int(word) if re.fullmatch(r"-?\d+", word) else word


def checked_classes(classes: list[str], where: str) -> list[str]:
    """The classes of a table; if all of them are numbers, 3.0 becomes 3.

    Raises:
        ValueError: one is missing (empty, `nan`, `None`, or -1 beside 0), or is a list.
    """
    if missing := [name for name in classes if _is_none(name)]:
        raise ValueError(
            f"{where}: {len(missing)} images have the class {missing[0]!r}: give them one, or move "
            "them out of SOURCE"
        )
    if wrong := next(filter(_is_list, classes), None):
        raise ValueError(f"{where}: {wrong!r:.40}: must be a class number or a class name")
    numbers = [found[1] for name in classes if (found := _WHOLE.fullmatch(name))]
    if {*numbers} >= {"-1", "0"}:
        raise ValueError(
            f"{where}: {numbers.count('-1')} images have the class -1 beside 0: if it means that "
            "they have none, move them out of SOURCE; otherwise name it"
        )
    return numbers if len(numbers) == len(classes) else classes


def all_or_no_labels(names: Sequence[str], labels: Sequence[Label | None]) -> list[Label] | None:
    """The labels, or None where no image has one.

    Raises:
        ValueError: only some have one, some have numbers and some names, or one is a list or
            stands for none, such as `nan`.
    """
    known = [label for label in labels if label is not None]
    for name, label in zip(names, labels, strict=True):
        if isinstance(label, str) and (_is_none(label) or _is_list(label)):
            raise ValueError(
                f"{name} has the label {label!r:.40}: must be a class number or a class name"
            )
    if 0 < len(known) < len(labels):
        without = [name for name, label in zip(names, labels, strict=True) if label is None]
        more = len(without) - 1
        raise ValueError(f"{without[0]} has no label, nor have {more} others, but the rest have")
    texts = [name for name, label in zip(names, labels, strict=True) if isinstance(label, str)]
    if 0 < len(texts) < len(known):
        raise ValueError(
            f"{texts[0]} and {len(texts) - 1} others have the name of a class as label, the rest "
            "have a number: must be all numbers or all names"
        )
    return known or None


def _is_none(text: str) -> bool:
    """Whether a text means no class, as pandas and Python write it."""
    return text in ("", "None") or text.lower() == "nan"


def _is_list(text: str) -> bool:
    return text[0] in "[{"


def _is_name(text: str) -> bool:
    """Whether a text is one printable line that is not a number."""
    line = text.strip()
    is_line = bool(line) and line.isprintable() and "\ufffd" not in line
    return is_line and not _NUMBERS.fullmatch(line)
