"""Streams over small datasets, for the tests of what happens when something breaks."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from data.dataset import Shards, open_shards
from data.stream import Batch, DataConfig, Stream

SIZE = 16
IMAGES = 60


def config_for(root: str, **changes: object) -> DataConfig:
    """Settings for a small dataset, decoded in this process, with some of them changed."""
    config = DataConfig(shards=root, image_size=SIZE, streams=4, block=8, workers=0, retries=1)
    return replace(config, **changes)  # type: ignore[arg-type]


def take(stream: Stream, *, images: int = 2 * IMAGES) -> list[Batch]:
    """The first batches of a run, two epochs by default."""
    batches = stream.batches(images_seen=0, batch_size=12, micro_batch_size=12, rank=0, ranks=1)
    return list(islice(batches, images // 12))


def epoch(root: str | Path, **changes: object) -> list[bytes]:
    """The pixels of two epochs."""
    config = config_for(str(root), **changes)
    with Stream(open_shards(root, fetch=config), config=config, seed=1) as stream:
        batches = take(stream)
        assert stream.bad == 0
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


def fails(shards: Shards, kind: type[Exception], pattern: str, **changes: object) -> None:
    """Check that streaming two epochs raises an error of this kind and message."""
    with (
        Stream(shards, config=config_for(shards.root, **changes), seed=1) as stream,
        pytest.raises(kind, match=pattern),
    ):
        take(stream)
