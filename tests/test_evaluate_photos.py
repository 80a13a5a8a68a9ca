"""Figures of photographs in the features of a real ImageNet network, through the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from bench.features import ImageNetFeatures, export
from bench.photos import make_photos
from data.transforms import center_crop, open_over
from tests.support import ranks
from trainer.evaluate import main
from trainer.evaluation.features import open_network
from trainer.ranks.process_group import connected
from trainer.ranks.world import join

SIDE, COUNT = 64, 160
PHOTOS = ("china.jpg", "flower.jpg")
Images = NDArray[np.uint8]


@pytest.mark.parametrize(("photo", "label"), [*zip(PHOTOS, (698, 985), strict=True)])
def test_the_network_knows_a_palace_and_a_daisy(photo: str, label: int) -> None:
    pixels = center_crop(Image.fromarray(load_sample_image(photo)), size=224)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    assert ImageNetFeatures().classify(images).argmax() == label


def photographs(root: Path) -> tuple[Images, NDArray[np.int64]]:
    """Pieces of both photographs, mixed, and the number of each one's photograph."""
    make_photos(root, images=2 * COUNT, classes=2, longest=200)
    files = sorted(root.rglob("*.JPEG"), key=lambda file: int(file.stem.split("_")[1]))
    images = [center_crop(open_over(file.read_bytes()).image, size=SIDE) for file in files]
    names = sorted({file.parent.name for file in files})
    return np.stack(images), np.array([names.index(file.parent.name) for file in files])


def each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


class Points(nn.Module):
    """Its features are every 16th point of its input of 224 x 224."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::16, ::16].flatten(1)


@pytest.mark.parametrize("side", [64, 400])
def test_dinov2_gets_photographs_as_pillow_resizes_them_in_full_fp32(
    side: int, tmp_path: Path
) -> None:
    """In ImageNet's mean and deviation; in the cubic filter that shrinks without aliasing."""
    images = torch.zeros(2, 3, 224, 224)
    shapes = ({0: torch.export.Dim("images", min=1, max=64)},)
    program = torch.export.export(Points(), (images,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "points.pt2")
    with connected(join(), patience=ranks.LIMIT) as device:
        network = open_network(f"dinov2:{tmp_path / 'points.pt2'}", device=device)
    pixels = np.stack([load_sample_image(photo)[:side, :side] for photo in PHOTOS])
    seen: list[bool] = []
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    network.net.register_forward_pre_hook(lambda *_: seen.extend(s.allow_tf32 for s in settings))
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = True
        found = network.compute(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert seen == [False, False]
        assert [setting.allow_tf32 for setting in settings] == [True, True]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
    planes = (pixels / np.float32(255)).transpose(0, 3, 1, 2)
    resized = [
        [np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)) for p in image]
        for image in planes
    ]
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    wanted = ((np.clip(resized, 0, 1) - mean) / deviation)[:, :, ::16, ::16].reshape(2, -1)
    assert found.spatial is found.logits is None and found.pool.dtype == torch.float32
    np.testing.assert_allclose(found.pool, wanted, atol=1e-4)


@pytest.mark.slow
def test_figures_of_photographs_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    images, photo = photographs(tmp_path / "photos")
    held, photo = images[COUNT:], photo[COUNT:]
    network, others, reference = (tmp_path / n for n in ("lite0.pt2", "others.npz", "R.npz"))
    np.savez(others, arr_0=images[:COUNT])
    export(ImageNetFeatures(), network, side=SIDE)
    common = ["--network", str(network)]
    assert main(["reference", str(others), "--out", str(reference), *common]) == 0
    mixed = held[: COUNT // 2]
    noise = np.random.default_rng(0).normal(size=mixed.shape)
    sets = {"real": mixed, "palace": held[photo == 0]}
    for level in (10, 40):
        sets[f"noise {level}"] = (mixed + level * noise).clip(0, 255).astype(np.uint8)
    for radius in (1, 3):
        blur = ImageFilter.GaussianBlur(radius)
        sets[f"blur {radius}"] = each(mixed, lambda image, blur=blur: image.filter(blur))
    found = {}
    for name, images in sets.items():
        samples = tmp_path / f"{name}.npz"
        np.savez(samples, arr_0=images)
        assert main([str(samples), "--reference", str(reference), *common]) == 0
        figures = json.loads(samples.with_suffix(".evaluation.json").read_text())["figures"]
        assert all(math.isfinite(figure["value"]) for figure in figures.values())
        found[name] = {n.rpartition("_")[0]: figure["value"] for n, figure in figures.items()}
    for damage, little, much in (("noise", 10, 40), ("blur", 1, 3)):
        ladder = [found[name] for name in ("real", f"{damage} {little}", f"{damage} {much}")]
        for figure in ("fid", "kid"):
            values = [step[figure] for step in ladder]
            assert values == sorted(values), (damage, figure, values)
        assert ladder[1]["precision"] < 0.8 * ladder[0]["precision"]
        assert ladder[2]["precision"] < 0.5 * ladder[0]["precision"]
    # One photograph of two: nothing is wrong with the images, and half of the others is missing.
    assert found["palace"]["precision"] > 0.9 * found["real"]["precision"]
    assert found["palace"]["recall"] < 0.7 * found["real"]["recall"]
