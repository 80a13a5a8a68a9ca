"""The Inception network of FID against recorded outputs of made-up weights; its references."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import golden
from trainer.evaluate import main
from trainer.evaluation import figures, reference
from trainer.evaluation.extraction import Extracted
from trainer.evaluation.features import FeatureNetwork
from trainer.evaluation.inception import Inception, resize
from trainer.sampling.samplefile import open_samples

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
        wanted = RECORDED[f"{size}.{name}"]
        if name == "spatial":  # recorded as (C, H, W); the evaluator's tensors are (H, W, C)
            wanted = wanted.permute(1, 2, 0)
        wanted = wanted.flatten()
        assert (value[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def maps_of(network: Inception, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (N, 2048), and the map that sFID takes as TensorFlow has it (N, H, W, C)."""
    seen: list[Tensor] = []
    branch = network.Mixed_6d.get_submodule("branch1x1")
    hook = branch.register_forward_hook(lambda *call: seen.append(call[2]))
    pool = network(images).pool
    hook.remove()
    return pool.double().numpy(), seen[0].double().permute(0, 2, 3, 1).numpy()


def moments(prefix: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {f"mu{prefix}": rows.mean(axis=0), f"sigma{prefix}": np.cov(rows, rowvar=False)}


def test_spatial_statistics_are_the_networks_in_references_of_any_order(
    network: Inception, tmp_path: Path
) -> None:
    few = np.random.RandomState(3).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=few.repeat(6, axis=0))
    images = torch.from_numpy(few).permute(0, 3, 1, 2)
    pool, maps = (part.repeat(6, axis=0) for part in maps_of(network, images))
    pool = pool[:, :5]
    evaluators = maps[..., :7].reshape(18, -1)
    np.savez(tmp_path / "evaluator.npz", **moments("", pool), **moments("_s", evaluators))

    found = network(images)
    pooled, spatial = (x.repeat_interleave(6, dim=0) for x in (found.pool[:, :5], found.spatial))
    mine = Extracted(
        count=18,
        pool=(figures.statistics(pooled),),
        spatial=(figures.statistics(spatial),),
        features=pooled,
        logits=None,
    )
    samples = open_samples(tmp_path / "images.npz")
    features = FeatureNetwork(
        name="inception", sha256="1" * 64, net=network, compute=network, is_inception=True
    )
    content = reference.of_images(samples, mine)
    reference.save(tmp_path / "new.npz", content, samples=samples, network=features)
    with np.load(tmp_path / "new.npz") as stored:
        new = dict(stored)
    np.testing.assert_allclose(new["mu_s"], evaluators.mean(axis=0), rtol=1e-4, atol=1e-4)
    about = json.loads(str(new["reference"]))
    about.pop("spatial_order", None)
    earlier = moments("_s", maps.transpose(0, 3, 1, 2)[:, :7].reshape(18, -1))
    np.savez(tmp_path / "earlier.npz", **{**new, **earlier, "reference": json.dumps(about)})

    for name in ("evaluator", "new", "earlier"):
        path = tmp_path / f"{name}.npz"
        there = reference.load(path, network=features, size=(8, 8))[0].spatial
        assert there is not None, name
        for part in ("mean", "covariance"):
            torch.testing.assert_close(getattr(there, part), getattr(mine.spatial[0], part))

    about["spatial_order"] = "width, height, channel"
    for changed, said in (
        ({"reference": json.dumps(about)}, "mu_s is by 'width, height, channel': must be by"),
        (moments("_s", evaluators[:, :5]), "mu_s has 5 numbers: must be 2023"),
    ):
        np.savez(tmp_path / "other.npz", **{**new, **changed})
        with pytest.raises(ValueError, match=said):
            reference.load(tmp_path / "other.npz", network=features, size=(8, 8))


@pytest.mark.slow
def test_sfid_of_a_references_own_images_is_0(network: Inception, tmp_path: Path) -> None:
    images = np.random.RandomState(4).randint(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    pool, maps = maps_of(network, torch.from_numpy(images).permute(0, 3, 1, 2))
    spatial = moments("_s", maps[..., :7].reshape(16, -1))
    np.savez(tmp_path / "evaluator.npz", arr_0=images, **moments("", pool), **spatial)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    against = ["--reference", tmp_path / "evaluator.npz", "--network", tmp_path / "weights.pth"]
    assert main([str(tmp_path / "samples.npz"), *map(str, against)]) == 0
    found = json.loads((tmp_path / "samples.evaluation.json").read_text())["figures"]
    assert abs(found["sfid_16"]["value"]) < 1e-5 * np.trace(spatial["sigma_s"])
    assert found["sfid_16"]["error"] > 0
