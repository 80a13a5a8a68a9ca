"""The classifier's heads: what each computes of the network's maps, and how it begins."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import golden
from tests.test_adm_unet import small_classifier, small_inputs
from trainer.adm.blocks import AttentionPool


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_every_pool_of_the_classifier_reaches_every_parameter(pool: str) -> None:
    net = small_classifier(pool=pool)
    out = net(**small_inputs(net))
    assert out.shape == (2, 5)
    (out * golden.wave("dy", (2, 5), 1.0)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("pool", ["adaptive", "spatial_v2"])
def test_a_head_that_no_published_classifier_has_computes_its_formula(pool: str) -> None:
    """The heads of published classifiers are compared with recorded values."""
    net, given = small_classifier(pool=pool), list[Tensor]()
    net.get_submodule("out").register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    out, (h,) = net(**small_inputs(net)), given
    values = [value for name, value in net.state_dict().items() if name.startswith("out.")]
    if pool == "adaptive":
        scale, shift, weight, bias = values
        pooled = F.silu(F.group_norm(h, 32, scale, shift)).mean(dim=(2, 3))
        wanted = pooled @ weight[:, :, 0, 0].T + bias
    else:
        first, offset, scale, shift, last, bias = values
        wanted = F.silu(F.group_norm(h @ first.T + offset, 32, scale, shift)) @ last.T + bias
    golden.assert_close(out, wanted, tolerance=1e-5)


def test_fresh_positions_of_the_attention_head_are_as_large_as_a_unit_vector() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(256, size=8, heads=4, classes=5)
    lengths = pool.positional_embedding.norm(dim=0)
    assert lengths.mean().item() == pytest.approx(1, abs=0.05)
