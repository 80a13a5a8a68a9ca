"""A photo set in ImageNet's layout is packed, verified and streamed."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.photos import make_photos
from data.config import DataConfig
from data.dataset import Shards, open_shards, verify
from data.pack import pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from data.stream import Stream
from data.transforms import center_crop, open_over

CLASSES, PER_CLASS, SIZE = 300, 2, 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    make_photos(root, images=CLASSES * PER_CLASS, classes=CLASSES, longest=100)
    return root


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    out = tmp_path_factory.mktemp("packed")
    executor = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    assert pack(Request(str(photos), PackConfig(size=SIZE)), out=out, executor=executor) == 0
    assert verify(out, full=True) == []
    return open_shards(out)


def test_all_classes_are_there_in_order(photos: Path, shards: Shards) -> None:
    assert shards.classes == tuple(sorted(path.name for path in photos.iterdir()))
    labels = np.concatenate([shards.index(i)["label"] for i in range(len(shards.shards))])
    assert (np.bincount(labels) == PER_CLASS).all() and len(shards.classes) == CLASSES
    # Shuffled once, globally: neighbours are of unrelated classes.
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 0.1


def test_the_stream_serves_the_reference_crops(photos: Path, shards: Shards) -> None:
    config = DataConfig(shards=shards.root, image_size=SIZE, workers=2, flip=False)
    served: dict[bytes, int] = {}
    with Stream(shards, config=config, seed=0) as stream:
        for batch in stream.parts(images=CLASSES * PER_CLASS, size=100, rank=0, ranks=1):
            for image, label in zip(batch.images, batch.labels, strict=True):
                served[image.numpy().tobytes()] = int(label)
    assert len(served) == CLASSES * PER_CLASS
    for path in sorted(photos.rglob("*.JPEG"))[::97]:
        crop = center_crop(open_over(path.read_bytes()).image, size=SIZE).transpose(2, 0, 1)
        assert shards.classes[served[crop.tobytes()]] == path.parent.name


def test_batches_are_as_mixed_as_ideal_shuffling(shards: Shards) -> None:
    """Counts of 10 groups of classes in batches vary as independent draws would have them."""
    config = DataConfig(shards=shards.root, image_size=SIZE, workers=0, streams=16)
    counts = []
    with Stream(shards, config=config, seed=0) as stream:
        batches = stream.batches(
            images_seen=0, batch_size=100, micro_batch_size=100, rank=0, ranks=1
        )
        for _ in range(20):
            groups = next(batches).labels % 10
            counts.append(torch.bincount(groups, minlength=10).double())
    variance = torch.stack(counts).var(dim=0).mean().item()
    assert 0.7 < variance / (100 * 0.1 * 0.9) < 1.3
