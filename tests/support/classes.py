"""Small sources with classes, and what became of them."""

import tarfile
from pathlib import Path

import pytest

from data.dataset import Shards
from data.exits import REFUSED
from data.pack import main
from tests.support.data_fixtures import image_file

NAMES = ("a.png", "b.png", "c.png", "d.png")


def folder(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(i, width=16, height=16, kind="PNG"))
    return root


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
