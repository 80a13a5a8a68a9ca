"""Small sources with classes, and what became of them."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.dataset import Shards, open_shards
from data.exits import REFUSED
from data.pack import main, pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from tests.support.data_fixtures import image_file

NAMES = ("a.png", "b.png", "c.png", "d.png")


def folder(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(i, width=16, height=16, kind="PNG"))
    return root


def packed(source: Path, out: str = "", **options: Any) -> Shards:
    """A source packed at 16 pixels into `out` beside it, by default o and its name."""
    to = source.parent / (out or f"o{source.name}")
    pack(Request(str(source), PackConfig(size=16), **options), out=to)
    return open_shards(to)


def refusal(capsys: pytest.CaptureFixture[str], source: Path, *options: str) -> str:
    capsys.readouterr()
    out = source.parent / "refused"
    arguments = [str(source), str(out), "--size", "16", "--workers", "1", *options]
    assert main(arguments) == REFUSED and not out.exists()
    return capsys.readouterr().err


def labels(shards: Shards) -> dict[str, str]:
    """The class of each image, by its name in the source."""
    found = {}
    for number, shard in enumerate(shards.shards):
        with tarfile.open(Path(shards.root, shard.tar)) as tar:
            keys = [name for name in tar.getnames() if name.endswith("png")]
        for key, label in zip(keys, shards.index(number)["label"], strict=True):
            found[key.split("-", 1)[1]] = shards.classes[label]
    return found
