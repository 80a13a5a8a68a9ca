"""What a run leaves when memory runs out, and what `training.deterministic` sets."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.adm.config import Pool
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.engine import determinism
from trainer.start import build_objective
from trainer.watch import forensics


def test_what_fills_the_memory_is_written_and_the_error_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Large, so that what other tests hold does not push it off the list.
    held = [torch.ones(1230, 4570) for _ in range(7)]
    with (
        pytest.raises(RuntimeError, match="can't allocate memory"),
        forensics.out_of_memory_kept(tmp_path, rank=3),
    ):
        held.append(torch.empty(2**55))
    text = (tmp_path / "memory_rank_3.txt").read_text()
    assert "7 x cpu torch.float32 (1230, 4570)" in text and "can't allocate memory" in text
    assert "lower training.micro_batch" in capsys.readouterr().err


def test_other_errors_leave_nothing_and_a_full_disk_takes_no_place_of_the_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(RuntimeError, match="other"), forensics.out_of_memory_kept(tmp_path, rank=0):
        raise RuntimeError("other")
    assert not list(tmp_path.iterdir())
    nowhere = tmp_path / "nowhere"
    with pytest.raises(MemoryError), forensics.out_of_memory_kept(nowhere, rank=0):
        raise MemoryError


def test_a_deterministic_run_sets_what_the_libraries_read_before_they_start(tiny: Path) -> None:
    for change, expected in (("true", {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"}), ("false", set())):
        env: dict[str, str] = {}
        overrides = [f"training.deterministic = {change}"]
        determinism.prepare(str(tiny), overrides, unset=[], env=env)
        assert env.keys() == expected
    determinism.prepare("no-such-preset", [], unset=[], env=env)  # refused elsewhere
    try:
        determinism.apply(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        determinism.apply(False)
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        determinism.apply(False)
    assert not torch.are_deterministic_algorithms_enabled()


class Named(TorchDispatchMode):
    """The operations that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


#: What torch.use_deterministic_algorithms refuses on CUDA, by its documentation.
REFUSED = re.compile(
    r"(_?adaptive_(avg|max)_pool\dd|avg_pool3d|fractional_max_pool\dd|reflection_pad\dd"
    r"|_?upsample_(bi|tri)?(linear|cubic)\dd(_aa)?|_?ctc_loss|grid_sampler_\dd)_backward"
    r"|max_unpool\dd|nll_loss2d\w*|_?embedding_bag\w*|put_?|histc|bincount|n?a?n?median|kthvalue"
    r"|_?(log)?cumsum(exp)?|cumprod|scatter_reduce_?|index_reduce_?"
)
SMALL = (
    "model.image_size = 16",
    "model.channels = 32",
    "model.channel_mult = [1, 2]",
    "model.blocks = 1",
    "model.attention = [8]",
)
NETS = [
    *(("imagenet64", f'model.resample = "{how}"') for how in ("biggan", "conv", "pool")),
    ("upsample64_256", "model.small_size = 8"),
    *(("classifier64", f'model.pool = "{pool}"') for pool in get_args(Pool)),
]


@pytest.mark.parametrize(("preset", "change"), NETS)
def test_no_operation_of_a_step_is_refused_by_a_deterministic_run(preset: str, change: str) -> None:
    config = configs.load(preset, [*SMALL, change])
    objective, net = build_objective(config), build(config.model)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with Named() as called:
        terms = objective(net, images, torch.tensor([0, 1]), torch.tensor([5, 6]))
        terms["loss"].mean().backward()
    assert any("conv" in name and name.endswith("_backward") for name in called.names)
    assert not [name for name in called.names if REFUSED.fullmatch(name)]


def test_an_operation_that_is_refused_would_be_seen() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with Named() as called:
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()
    assert [name for name in called.names if REFUSED.fullmatch(name)]
