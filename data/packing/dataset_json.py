"""The labels in `dataset.json`, as the tools of StyleGAN and EDM write it."""

import json
from collections import Counter
from dataclasses import replace

from data.packing.class_maps import say_unused
from data.packing.listing import Listing, by_number, without_labels
from data.packing.names import composed

DATASET_JSON = "dataset.json"


def by_dataset_json(listing: Listing, content: bytes, *, where: str) -> Listing:
    """The listing with the labels of StyleGAN's `dataset.json`, or without classes if it has none.

    Raises:
        ValueError: it is damaged, has labels that are no class numbers, or lacks an image.
    """
    where = f"{where}/{DATASET_JSON}"
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(found, dict) or "labels" not in found:
        return listing  # a file of another program
    skipped = Counter(listing.skipped) - Counter([".json"])
    if not found["labels"]:
        return replace(without_labels(listing.names), skipped=skipped)
    try:
        items = found["labels"].items() if isinstance(found["labels"], dict) else found["labels"]
        pairs = [(composed(name), label) for name, label in items]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: labels must be a list of [NAME, LABEL]") from None
    label_of = dict(pairs)
    if wrong := next((name for name, label in pairs if label_of[name] != label), None):
        raise ValueError(f"{where} has {wrong} twice, with different labels: keep one of them")
    labels = []
    for name in listing.names:
        if (key := composed(name)) not in label_of:
            raise ValueError(f"{where} has no label for {name}: add it, or give --class-map")
        if type(label := label_of[key]) is not int:
            raise ValueError(f"{where}: the label of {name} = {label!r:.40}: must be a number")
        labels.append(label)
    say_unused(len(label_of) - len({*map(composed, listing.names)}), "labels", where)
    listed = by_number(listing.names, labels)
    return replace(listed, skipped=skipped, is_numbered=True)
