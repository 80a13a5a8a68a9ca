"""The nets against recorded values, and every option."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import golden
from trainer.adm import unet
from trainer.adm.blocks import merge_windows, split_windows
from trainer.adm.config import ClassifierConfig, UNetConfig
from trainer.adm.unet import Classifier, UNet
from trainer.planning import costs

CASES = {case["name"]: case for case in golden.table("cases")["models"]}
DOUBLE = golden.tensors("double")
PUBLISHED = golden.table("published_models")

# Measured on the reference (the project's table of published models), GFLOP per image.
GFLOPS = {
    "64x64_diffusion": 219.4,
    "128x128_diffusion": 613.9,
    "256x256_diffusion": 2239.7,
    "512x512_diffusion": 3964.7,
    "64_256_upsampler": 1263.3,
    "128_512_upsampler": 5009.6,
    "64x64_classifier": 38.2,
    "128x128_classifier": 42.1,
    "256x256_classifier": 146.7,
    "512x512_classifier": 225.5,
}


def case_inputs(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    size = case.get("image_size") or case["large_size"]
    inputs = {"x": golden.wave(f"x:{name}", (2, 3, size, size), 1.0), "t": torch.tensor([7, 803])}
    if case.get("class_cond"):
        inputs["y"] = torch.tensor([3, 912])
    if case["kind"] == "superres":
        small = case["small_size"]
        inputs["low_res"] = golden.wave(f"low_res:{name}", (2, 3, small, small), 1.0)
    return inputs


def run_case(name: str, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A recorded case's output and input gradient, computed in `dtype`."""
    net = golden.build(CASES[name]["kind"], CASES[name])
    golden.set_formula_weights(net)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case_inputs(name).items()}
    x = inputs["x"].requires_grad_()
    out = net.to(dtype)(**inputs)
    (out * golden.wave(f"dy:{name}", tuple(out.shape), 1.0)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("name", CASES)
def test_output_and_input_gradient_are_the_recorded_ones(name: str) -> None:
    # The formula's weights amplify the rounding of single precision, which is another one on every
    # kind of CPU: the reference itself departs from its own recording by up to 4e-4 elsewhere.
    # In double precision net and reference are the same, and tell how exact the recording is.
    out, gradient = run_case(name, dtype=torch.float64)
    golden.assert_close(out, DOUBLE[f"{name}.out"], tolerance=1e-6)
    golden.assert_close(gradient, DOUBLE[f"{name}.grad_x"], tolerance=1e-6)
    tolerance = 3e-4 if name == "unet_add_plain_heads" else 1e-4
    golden.assert_close(out, golden.tensors("models")[f"{name}.out"], tolerance=tolerance)
    golden.assert_close(gradient, golden.tensors("models")[f"{name}.grad_x"], tolerance=1e-3)
    single, single_gradient = run_case(name, dtype=torch.float32)
    golden.assert_close(single, out, tolerance=1e-3)
    golden.assert_close(single_gradient, gradient, tolerance=1e-3)


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_are_the_measured_ones(name: str) -> None:
    model = PUBLISHED[name]
    classifier = model["kind"] == "classifier"
    build = golden.classifier_config if classifier else golden.unet_config
    found = costs.of_network(build(model["flags"])).forward_flops
    assert found / 1e9 == pytest.approx(GFLOPS[name], rel=0.01)


SMALL: dict[str, Any] = {
    "image_size": 16,
    "channels": 32,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention": (8,),
    "heads": 2,
    "num_classes": 5,
}


def small_unet(**changes: Any) -> UNet:
    net = UNet(UNetConfig(**{**SMALL, **changes}))
    golden.set_formula_weights(net)
    return net


def small_classifier(**changes: Any) -> Classifier:
    net = Classifier(ClassifierConfig(**{**SMALL, **changes}))
    golden.set_formula_weights(net)
    return net


def small_inputs(net: nn.Module) -> dict[str, Tensor]:
    inputs = {"x": golden.wave("x", (2, 3, 16, 16), 1.0), "t": torch.tensor([7, 803])}
    if isinstance(net, UNet) and net.config.num_classes is not None:
        inputs["y"] = torch.tensor([0, 4])
    if isinstance(net, UNet) and net.config.small_size is not None:
        inputs["low_res"] = golden.wave("low_res", (2, 3, 8, 8), 1.0)
    return inputs


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv": "new"},
        {"resample": "conv"},
        {"resample": "pool"},
        {"conditioning": "add"},
        {"conditioning": "concat"},
        {"rescale_residuals": True},
        {"attention": (16, 8), "local_attention": (16,), "local_window": 8},
        {"attention": (16, 8), "local_attention": (16, 8), "local_window": 4},
        {"heads": None, "head_channels": 16, "checkpoint": True},
        {"heads_up": 4, "learn_sigma": False},
        {"num_classes": None, "dropout": 0.3},
        {"small_size": 8},
        {"channels": 64, "channel_mult": (0.5, 1)},
    ],
)
def test_every_option_of_the_unet_reaches_every_parameter(changes: dict[str, Any]) -> None:
    net = small_unet(**changes)
    out = net(**small_inputs(net))
    assert out.shape == (2, 6 if net.config.learn_sigma else 3, 16, 16)
    (out * golden.wave("dy", tuple(out.shape), 1.0)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_rescaling_changes_only_the_sums() -> None:
    plain, rescaled = small_unet(), small_unet(rescale_residuals=True)
    assert plain.state_dict().keys() == rescaled.state_dict().keys()
    inputs = small_inputs(plain)
    assert not torch.allclose(plain(**inputs), rescaled(**inputs), atol=1e-3)


def test_a_window_as_large_as_the_map_is_global_attention() -> None:
    whole = small_unet()
    local = small_unet(local_attention=(8,), local_window=8)
    golden.assert_close(local(**small_inputs(local)), whole(**small_inputs(whole)), tolerance=1e-5)


def test_local_attention_does_not_see_beyond_its_window() -> None:
    net: Any = small_unet(attention=(16, 8), local_attention=(16,), local_window=4)
    block = net.input_blocks[1][1]
    x = golden.wave("map", (1, 32, 16, 16), 1.0).requires_grad_()
    tokens = split_windows(x, size=4)
    torch.testing.assert_close(merge_windows(tokens, size=4, shape=x.shape), x)
    # GroupNorm sees the whole map, so it is left out.
    block.norm = nn.Identity()
    block(x)[:, :, 5, 9].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 8:12] = True
    assert torch.equal(seen, inside)


def test_fresh_nets_begin_as_zero() -> None:
    """Every residual and the output: before training, no noise is predicted at all."""
    net = UNet(UNetConfig(**SMALL))
    assert not net(**small_inputs(net)).any()
    weights = {n for n, p in net.named_parameters() if n.endswith("weight")}
    last = {n for n in weights if re.search(r"\.(out_layers\.3|proj_out)\.weight$|^out\.2", n)}
    assert {n for n in weights if not net.get_parameter(n).any()} == last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [small_unet, small_classifier])
def test_16_bit_nets_are_close_to_fp32(build: Any, dtype: torch.dtype) -> None:
    net = build()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        # The formula's smooth waves nearly cancel in every sum, which 16 bits cannot follow.
        fan_in = max(1, parameter[0].numel())
        nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    inputs = small_inputs(net)
    want = net(**inputs).detach()
    got = net.to(dtype)(**inputs)
    assert got.dtype == torch.float32
    golden.assert_close(got.detach(), want, tolerance=0.04 if dtype is torch.bfloat16 else 0.005)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["persistent", "computed", "frozen"])
def test_a_network_has_no_state_but_what_is_learned(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Positions(UNet):
        def __init__(self, config: UNetConfig) -> None:
            super().__init__(config)
            if kind == "frozen":
                self.table = nn.Parameter(torch.ones(8), requires_grad=False)
            else:
                self.register_buffer("table", torch.ones(8), persistent=kind == "persistent")

    config = UNetConfig(**SMALL)
    unet.build(config)
    monkeypatch.setattr(unet, "UNet", Positions)
    with pytest.raises(AssertionError, match="table is a buffer or frozen"):
        unet.build(config)


def test_checkpointing_keeps_the_dropout_masks() -> None:
    gradients = []
    for checkpoint in (False, True):
        net = small_unet(dropout=0.5, checkpoint=checkpoint)
        torch.manual_seed(0)
        net(**small_inputs(net)).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 17}, "model.image_size = 17"),
        ({"channels": 40}, "model.channels = 40"),
        ({"channel_mult": ()}, "one multiplier for each level"),
        ({"channel_mult": (1, 0.7)}, "multiple of 32"),
        ({"blocks": 0}, "model.blocks = 0"),
        ({"attention": (4,)}, "model.attention = "),
        ({"heads": 3}, "= 3: must be a divisor"),
        ({"heads": None}, "one of the two must"),
        ({"head_channels": 16}, "one of the two must"),
        ({"heads": None, "head_channels": 16, "heads_up": 2}, "model.heads_up = 2"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"conditioning": "film"}, 'model.conditioning = .film.: must be one of "adagn", '),
        ({"local_attention": (16,)}, "model.local_attention = "),
        ({"local_attention": (8,), "local_window": 3}, "model.local_window = 3"),
        ({"num_classes": 0}, "model.num_classes = 0"),
        ({"small_size": 16}, "model.small_size = 16"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        UNetConfig(**{**SMALL, **changes})
