"""The systems that the benchmark of the data layer compares do the same work."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from bench.photos import make_photos
from bench.systems import BATCH, SYSTEMS, stored_images
from data.pack import main as pack

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bench")
    make_photos(base / "photos", images=5 * BATCH, classes=10, longest=100)
    words = [str(base / "photos"), str(base / "shards"), "--format", "jpg", "--size", str(SIZE)]
    assert pack(words) == 0
    return base / "shards"


@pytest.mark.parametrize(
    "name", [name for name in SYSTEMS if "decod" not in name and "alone" not in name]
)
def test_systems_serve_the_same_pixels_in_the_same_layout(name: str, root: Path) -> None:
    if "MosaicML" in name and not find_spec("streaming"):
        pytest.skip("MosaicML Streaming is not installed")
    mirrored = {}
    for content in stored_images(root):
        pixels = simplejpeg.decode_jpeg(content, colorspace="RGB")
        mirrored |= {pixels.tobytes(): False, np.flip(pixels, 1).tobytes(): True}
    batches = SYSTEMS[name](root, SIZE, 1)
    served = list(islice((b for b in batches if len(b) == BATCH), 4))
    found = []
    for batch in served:
        assert isinstance(batch, torch.Tensor) and batch.dtype == torch.uint8
        assert batch.shape == (BATCH, 3, SIZE, SIZE)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        found += [mirrored[image.numpy().tobytes()] for image in batch.permute(0, 2, 3, 1)]
    assert 0.3 < np.mean(found) < 0.7
