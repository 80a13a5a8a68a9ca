"""The Inception network of FID against recorded outputs of made-up weights."""

from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import golden
from trainer.evaluation.inception import Inception, resize

TABLE = golden.table("inception")
RECORDED = golden.tensors("inception")


def formula(key: str, shape: list[int]) -> Tensor:
    """The made-up weights of a key, as the table states them."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    draw = np.random.RandomState(crc32(key.encode())).randn(*shape)
    if len(shape) > 1:
        value = draw * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(draw)
    else:
        value = 0.1 * draw + key.endswith("weight")
    return torch.from_numpy(value.astype(np.float32))


def image(size: int) -> Tensor:
    small = np.random.RandomState(size).randint(0, 256, (3, 8, 8))
    return torch.from_numpy(small.repeat(size // 8, axis=1).repeat(size // 8, axis=2))[None]


@pytest.fixture(scope="module")
def network() -> Inception:
    net = Inception()
    weights = {key: formula(key, shape) for key, shape in TABLE["shapes"].items()}
    net.load_state_dict(weights)  # every key of the published file, and no other
    return net


@pytest.mark.parametrize("size", [64, 320])
def test_features_are_the_recorded_ones(network: Inception, size: int) -> None:
    corner = RECORDED[f"{size}.resized_corner"]
    resized = resize(image(size).double())[0, :, :24, :24]
    torch.testing.assert_close(resized.float(), corner, rtol=1e-5, atol=1e-3)
    found = network(image(size))
    for name, value in found._asdict().items():
        wanted = RECORDED[f"{size}.{name}"].flatten()
        assert (value[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
