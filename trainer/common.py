"""What all ranks must have in common, compared before anything is claimed or computed.

A node with an older checkout, another package, preset or copy of the shards would train, draw or
evaluate along without a word, and spoil the result of all ranks.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version as version_of
from typing import Any

from data.mixture import Dataset
from data.version import digest, version
from trainer.config import experiment as configs
from trainer.config import settings
from trainer.config.experiment import Config
from trainer.ranks.faults import Refused
from trainer.ranks.group import gather
from trainer.ranks.world import host_name
from trainer.run.trainstate import TrainState

# Paths that may differ from node to node, as long as the same is there.
_PLACES = (
    *("data.shards", "data.mix", "data.validation", "data.cache"),
    *("evaluation.reference", "evaluation.network"),
)
# Options that each rank may have of its own.
_OWN = ("local_rank", "job")
# Packages whose versions change numbers or pixels.
_PACKAGES = ("torch", "deepspeed", "numpy", "pillow", "safetensors", "webdataset")
_OPTIONS = ("from", "init", "init_skip", "profile", "patience")
# Letters of a value in a message; a checksum has fewer.
_LONG = 100
# Differences that the message names of each host.
_NAMED = 4


def facts(
    config: Config,
    *,
    ds_config: Mapping[str, Any],
    datasets: Mapping[str, Dataset | None],
    options: argparse.Namespace,
) -> dict[str, str]:
    """By name what this rank has; credentials are left out. `datasets` are by their settings."""
    flat = configs.flatten(configs.public(config))
    return {
        **software(),
        **{name: str(value) for name, value in flat.items() if name not in _PLACES},
        **{n: json.dumps(value) for n, value in settings.leaves(ds_config, "ds_config").items()},
        **{f"images of {name}": data.fingerprint for name, data in datasets.items() if data},
        **{f"--{name.replace('_', '-')}": str(vars(options).get(name)) for name in _OPTIONS},
    }


def software() -> dict[str, str]:
    """The code and the packages that this rank has, by name."""
    return {"code (sha256)": digest(), **_packages()}


@cache
def running() -> dict[str, str]:
    """The release, its commit and the packages that this process runs, by name."""
    return {"adm-trainer": version(), **_packages()}


def changes_since(state: TrainState) -> list[str]:
    """What the log says where other software has written the checkpoint that a run resumes from."""
    return [
        f"{name} changes from {before} to {own}"
        for name, own in running().items()
        if (before := state.software.get(name)) not in (None, own)
    ]


def _packages() -> dict[str, str]:
    return {package: version_of(package) for package in _PACKAGES}


def command_facts(arguments: argparse.Namespace) -> dict[str, str]:
    """What this rank has where its command line says all: software and arguments, by name."""
    given = {name: value for name, value in vars(arguments).items() if name not in _OWN}
    return {**software(), **{name: str(value) for name, value in given.items()}}


def check(mine: Mapping[str, str]) -> None:
    """Return if all ranks have the same. All ranks must call it.

    Raises:
        Refused: on every rank; names the ranks that differ from the main rank, and in what.
    """
    if len(set(gather(hashlib.sha256(json.dumps(mine).encode()).hexdigest()))) > 1:
        raise Refused(
            f"the ranks differ: {_differences(gather((host_name(), mine)))}; start all "
            "with the same code, packages, preset, options and files"
        )


def _differences(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Which ranks differ from the first, and in what; ranks that differ alike are named once."""
    expected, said = everyone[0][1], dict[str, list[int]]()
    for rank, (host, found) in enumerate(everyone):
        names = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
        pairs = [(n, *near(_short(found.get(n)), _short(expected.get(n)))) for n in names]
        parts = [f"{name} = {own} (rank 0: {wanted})" for name, own, wanted in pairs]
        more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
        if parts:
            said.setdefault(f"on {host}: {', '.join(parts[:_NAMED])}{more}", []).append(rank)
    return "; ".join(
        f"rank{'s' * (len(own) > 1)} {', '.join(map(str, own))} {text}"
        for text, own in said.items()
    )


def _short(value: str | None) -> str:
    """A value in words; of checksums the beginning."""
    return "absent" if value is None else value if len(value) != 64 else value[:12]


def near(one: str, other: str) -> tuple[str, str]:
    """Two values as a message has them; of long ones, such as 1,000 classes, where they differ."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    place = next(differing, min(len(one), len(other)))
    first, last = max(place - _LONG // 2, 0), place + _LONG // 2

    def cut(text: str) -> str:
        if len(text) <= _LONG:
            return text
        return f"{'...' * (first > 0)}{text[first:last]}{'...' * (last < len(text))}"

    return cut(one), cut(other)
