"""Each value of a choice computes something of its own: a new one must not be computed as another.

A choice is a setting that has one of several names, such as `diffusion.predict`.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from tests.support import golden
from trainer.adm.config import ClassifierConfig, DiffusionConfig, Predict, UNetConfig
from trainer.adm.diffusion import Diffusion
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config.sections import Timesteps
from trainer.start import build_objective

SHAPE, STEPS = (3, 3, 8, 8), 50
WAVES = {name: golden.wave(name, SHAPE, 0.9) for name in ("x0", "noise", "prediction", "variance")}
T = torch.tensor([1, 10, 40])
# What each choice of the diffusion decides, by its name in `computed`.
DECIDES = {
    "schedule": ("betas",),
    "predict": ("target", "mean"),
    "variance": ("variance",),
    "loss": ("loss",),
}
NET: dict[str, Any] = {
    "image_size": 8,
    "channels": 32,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention": (4,),
    "heads": 2,
}


def choices(kind: type) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(h) for name, h in hints.items() if get_origin(h) is Literal}


def assert_all_differ(found: Mapping[str, Tensor], *, of: str) -> None:
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        equal = one.shape == other.shape and torch.allclose(one, other)
        assert not equal, f"{of}: {a!r} and {b!r} compute the same"


def computed(choice: str, value: str) -> dict[str, Tensor]:
    """What a diffusion computes from one output of a net."""
    given: dict[str, Any] = {"schedule": "linear", "variance": "fixed_small", "loss": "vlb"}
    if choice == "loss" and value != "simple":
        given["variance"] = "learned"
    config = DiffusionConfig(steps=STEPS, **{**given, choice: value})
    diffusion, waves = Diffusion(config), dict(WAVES)
    x_t = diffusion.q_sample(waves["x0"], T, waves["noise"])
    out = waves["prediction"]
    if config.variance == "learned":
        out = torch.cat((out, waves["variance"]), dim=1)
    p = diffusion.p_mean_variance(out, x_t, T, clip=False)
    terms = diffusion.losses(out, x0=waves["x0"], x_t=x_t, noise=waves["noise"], t=T)
    return {
        "betas": diffusion.betas,
        "target": diffusion.target(waves["x0"], waves["noise"], T),
        "mean": p.mean,
        "variance": p.variance,
        "loss": terms["loss"],
    }


def test_each_choice_of_the_diffusion_is_computed_otherwise() -> None:
    found = choices(DiffusionConfig)
    assert set(found) == set(DECIDES), "DECIDES: what the new choice decides"
    for choice, values in found.items():
        results = {value: computed(choice, value) for value in values}
        for part in DECIDES[choice]:
            decided = {value: each[part] for value, each in results.items()}
            assert_all_differ(decided, of=f"diffusion.{choice}, {part}")


@pytest.mark.parametrize("predict", get_args(Predict))
def test_the_image_is_read_from_what_the_net_learns_to_predict(predict: Any) -> None:
    config = DiffusionConfig(
        steps=STEPS, schedule="cosine", variance="fixed_large", loss="simple", predict=predict
    )
    diffusion, x0, noise = Diffusion(config), WAVES["x0"], WAVES["noise"]
    x_t, perfect = diffusion.q_sample(x0, T, noise), diffusion.target(x0, noise, T)
    read = diffusion.p_mean_variance(perfect, x_t, T, clip=False)
    golden.assert_close(read.x0, x0, tolerance=1e-5)
    terms = diffusion.losses(perfect, x0=x0, x_t=x_t, noise=noise, t=T)
    assert not terms["loss"].any()


@pytest.mark.parametrize(
    ("kind", "choice", "values"),
    [
        (kind, choice, values)
        for kind in (UNetConfig, ClassifierConfig)
        for choice, values in choices(kind).items()
    ],
)
def test_each_choice_of_a_network_is_computed_otherwise(
    kind: Any, choice: str, values: tuple[str, ...]
) -> None:
    found = {}
    for value in values:
        net = build(kind(num_classes=5, **{**NET, choice: value}))
        golden.set_formula_weights(net)
        labels = {"y": torch.tensor([0, 1, 2])} if kind is UNetConfig else {}
        with torch.no_grad():
            found[value] = net(WAVES["x0"], T, **labels)
    assert_all_differ(found, of=f"model.{choice} of {kind.__name__}")


def test_each_way_to_draw_timesteps_draws_others_by_image_and_resumes() -> None:
    config, found, indices = configs.load("digits"), {}, torch.arange(100)
    steps = config.diffusion.steps
    for value in get_args(Timesteps):
        training = dataclasses.replace(config.training, timesteps=value)
        sampler, fresh = (
            build_objective(dataclasses.replace(config, training=training)).timesteps
            for _ in range(2)
        )
        t = torch.arange(steps).repeat(10)
        sampler.update(t, t.double())
        found[value], weights = sampler.draw(indices)
        fresh.load(json.loads(json.dumps(sampler.state())))
        parts = [fresh.draw(part) for part in indices.split(30)]
        for one, other in zip((found[value], weights), zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(other)), f"{value}: not by image, or not resumed"
        assert ((found[value] >= 0) & (found[value] < steps)).all()
    assert_all_differ(found, of="training.timesteps")
