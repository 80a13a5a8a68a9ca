"""Small packed datasets for the tests of the data layer."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.manifest import index_bytes, manifest_text
from data.pack import pack
from data.plan import PackConfig
from data.shards import Shards, describe, open_shards
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


def pack_folder(root: Path, *, images: int, size: int = 16, per_shard: int = 9) -> Shards:
    """A packed dataset under `root` of that many pictures."""
    source = write_folder(root / "source", images=images)
    config = PackConfig(size=size, per_shard=per_shard)
    pack(str(source), out=root / "shards", config=config)
    return open_shards(root / "shards")


def write_shards(root: Path, *, blobs: list[list[bytes]], image_size: int) -> Shards:
    """A dataset of exactly these PNG files in exactly these shards; labels count them."""
    shards, label = [], 0
    for i, contents in enumerate(blobs):
        tar = root / f"{i}.tar"
        with tar.open("wb") as file:
            writer = ShardWriter(file)
            for blob in contents:
                writer.add(f"key{label}", image=blob, suffix="png", label=label)
                label += 1
            index = writer.close()
        tar.with_suffix(".idx.npy").write_bytes(index_bytes(index))
        shards.append(describe(tar, index, index_bytes(index)))
    classes = tuple(str(i) for i in range(label))
    text = manifest_text(tuple(shards), classes=classes, image_size=image_size, made_by={})
    (root / "manifest.json").write_text(text)
    return open_shards(root)
