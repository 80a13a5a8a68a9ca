"""Whether the classes of the shards fit those of the network, and a run's images in words."""

import itertools
import shlex
from collections.abc import Sequence

from data.config import shown
from data.mixture import Dataset
from trainer.config.experiment import Config
from trainer.run.directory import Run
from trainer.run.runstate import committed


def check(config: Config, shards: Dataset, *, run: Run) -> None:
    """Raise ValueError unless the shards have the labels that the network needs."""
    classes, found = config.model.num_classes, len(shards.classes)
    if classes is None:
        return
    if not shards.labelled or found == 1 < classes:
        raise ValueError(
            f"{shards.where}: {_lack(shards)}, but model.num_classes = {classes}: "
            f"{_ways_out(config, run)}"
        )
    if found > classes:
        raise ValueError(
            f"{shards.where} has {found} classes, the network {classes}: "
            f"set model.num_classes to {found}"
        )


def check_held_out(
    config: Config, shards: Dataset, *, training: tuple[str, ...], named: str
) -> None:
    """Raise ValueError unless `shards` number their classes as the training set does.

    `training` are the names of the training set's classes, `named` is the setting or option.
    """
    if config.model.num_classes is None or training == shards.classes:
        return
    first, there, here = _first_difference(training, shards.classes)
    raise ValueError(
        f"{named} = {shards.where}: class {first} is {here}, in data.shards "
        f"{there}: pack it again with --classes-of {shlex.quote(shown(config.data.shards))}"
    )


def difference(own: Sequence[str] | None, theirs: Sequence[str] | None, *, named: str) -> str:
    """How two lists of classes differ first, in words; "" if not, or if one is not known (None).

    `own` are those of the network `named`.
    """
    if own is None or theirs is None or tuple(own) == tuple(theirs):
        return ""
    first, here, there = _first_difference(own, theirs)
    return f"its class {first} is {there}, that of {named} {here}"


def _first_difference(own: Sequence[str], theirs: Sequence[str]) -> tuple[int, str, str]:
    """The first number whose names differ, and its name in each list, quoted or "missing"."""
    pairs = enumerate(itertools.zip_longest(own, theirs))
    first, names = next((i, names) for i, names in pairs if names[0] != names[1])
    here, there = ("missing" if name is None else repr(name) for name in names)
    return first, here, there


def untrained(config: Config, shards: Dataset) -> str:
    """A line for the log if the network has classes of which there are no images; else ""."""
    classes, found = config.model.num_classes, len(shards.classes)
    if classes is None or found >= classes:
        return ""
    last = classes - 1
    which = f"class {last} is" if found == last else f"classes {found} to {last} are"
    return (
        f"{shards.where} has {found} classes, the network {classes}: {which} never trained, but "
        f"drawn where --classes is absent; else set model.num_classes to {found}"
    )


def extent(config: Config, shards: Dataset) -> str:
    """The images of a run, their classes and the number of epochs, for the log's first line."""
    count = len(shards.classes)
    kind = f"in {count} class{'es' if count > 1 else ''}" if shards.labelled else "without labels"
    epochs = ", ".join(
        f"{config.training.images * share / part.count:,.1f}" for part, share in shards.shares
    )
    return f"{shards.count:,} images {kind}, {epochs} epochs"


def _lack(shards: Dataset) -> str:
    if shards.labelled:
        return f"all images have the same label, {shards.classes[0]!r}"
    if len({part.classes for part in shards.parts}) > 1:
        return "the datasets have different classes (--classes-of gives one those of another)"
    if len(shards.classes) == 1:
        return "the images have no labels"
    return "some images have no label (they lie beside the folders of the classes)"


def _ways_out(config: Config, run: Run) -> str:
    pack = "pack the images again with a folder for each class or with --class-map"
    unset = ", or train a network without classes: --unset model.num_classes"
    again = f". {run.path} was trained on these shards: start another run"
    return (
        pack
        + (unset if config.objective == "denoise" else "")
        + (again if committed(run.checkpoints) else "")
    )
