"""Small packed datasets for the tests of the data layer."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from data.config import DataConfig
from data.dataset import Shards, open_shards, write_index
from data.manifest import manifest_text
from data.pack import pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from data.stream import Stream
from data.tars import ShardWriter


def image_file(seed: int, *, width: int, height: int, kind: str = "JPEG") -> bytes:
    """A smooth random picture as an image file."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format=kind)
    return buffer.getvalue()


def write_folder(root: Path, *, images: int, classes: int = 3) -> Path:
    """A tree ROOT/CLASS/NAME.JPEG of varied small pictures; names repeat between classes."""
    for i in range(images):
        path = root / f"n{i % classes:04d}" / f"img_{i // classes}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(i, width=20 + i % 17, height=20 + i % 13))
    return root


def pack_folder(root: Path, *, images: int, size: int = 16) -> Shards:
    """A packed dataset under `root` of that many pictures."""
    source = write_folder(root / "source", images=images)
    pack(Request(str(source), PackConfig(size=size, per_shard=9)), out=root / "shards")
    return open_shards(root / "shards")


def write_shards(root: Path, *, stored: list[list[bytes]], image_size: int) -> Shards:
    """A dataset of exactly these PNG files in exactly these shards; labels count them."""
    shards, label = [], 0
    for i, images in enumerate(stored):
        tar = root / f"{i}.tar"
        with tar.open("wb") as file:
            writer = ShardWriter(file)
            for image in images:
                writer.add(f"key{label}", image=image, suffix="png", label=label)
                label += 1
            index = writer.close()
        shards.append(write_index(tar, index))
    classes = tuple(str(i) for i in range(label))
    text = manifest_text(tuple(shards), classes=classes, image_size=image_size, made_by={})
    (root / "manifest.json").write_text(text)
    return open_shards(root)


def packed(source: Path, out: Path) -> Shards:
    """A source packed at 16 pixels, under `out`."""
    pack(Request(str(source), PackConfig(size=16, per_shard=9)), out=out / "packed")
    return open_shards(out / "packed")


def content(shards: Shards) -> set[tuple[bytes, int]]:
    """The set of (pixels, label) in a dataset."""
    config = DataConfig(shards=shards.root, image_size=16, workers=0, streams=1)
    with Stream(shards, config=config, seed=0) as stream:
        batch = stream.load(range(shards.count), once=True)
    pixels = (image.numpy().tobytes() for image in batch.images)
    return set(zip(pixels, batch.labels.tolist(), strict=True))


def image_files(folder: Path) -> list[tuple[Path, int]]:
    """The image files of `write_folder`, with their labels."""
    return [(path, int(path.parent.name[1:])) for path in sorted(folder.rglob("*.JPEG"))]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these files, in this order; names may repeat but for a trailing slash."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def zipped(folder: Path, to: Path | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip of a folder, beside it or at `to`."""
    to = to or folder.with_suffix(".zip")
    with zipfile.ZipFile(to, "w", compression) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return to


def write_tars(folder: Path, out: Path, *, json_labels: bool = False) -> Path:
    """The images of `write_folder` in tars as webdataset writes them."""
    out.mkdir()
    with wds.ShardWriter(str(out / "other-%03d.tar"), maxcount=13, verbose=0) as writer:
        for i, (path, label) in enumerate(image_files(folder)):
            labels = {"json": json.dumps({"label": label})} if json_labels else {"cls": label}
            writer.write({"__key__": f"deep/{i:06d}", "jpg": path.read_bytes(), **labels})
    return out
