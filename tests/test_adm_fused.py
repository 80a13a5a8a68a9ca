"""The fused norm: Triton's interpreter against double precision, and its kernels for an H100."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from tests.support import ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def measured(module: str) -> Any:
    """What a support module prints, from a process without this one's environment for Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}"], cwd=ranks.ROOT, env=env, text=True,
        timeout=ranks.LIMIT, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 fails with numpy 2.4")
    return measured("interpreted")


@pytest.mark.slow
def test_errors_are_no_larger_than_the_plain_norm_s(interpreted: Any) -> None:
    for case in interpreted["cases"]:
        for name, error in case["fused"].items():
            *_, dtype, _, _, mean = case["case"]
            # Triton's interpreter cuts bf16 off where a GPU rounds.
            plain = case["plain"][name] * (2 if dtype == "bfloat16" else 1)
            # A mean in fp32 has an error of its own size times 6e-8.
            least = 5e-7 + 6e-8 * mean if dtype == "float32" else 1e-14
            assert error <= max(plain, least), (case, name)


@pytest.mark.slow
def test_a_net_in_double_precision_is_the_same(interpreted: Any) -> None:
    for name, errors in interpreted["nets"].items():
        assert max(errors) < 1e-12, name


@pytest.mark.slow
def test_the_operation_is_one_that_graphs_can_hold(interpreted: Any) -> None:
    assert set(interpreted["check"].values()) == {"SUCCESS"}


@pytest.fixture(scope="module")
def compiled() -> Any:
    return measured("compiled")


def test_kernels_for_an_h100_spill_no_registers_and_fill_it(compiled: Any) -> None:
    kernels = compiled["costs"]
    assert len({each["kernel"] for each in kernels}) == 6
    for each in kernels:
        assert each["spilled"] == 0, each
        # A multiprocessor has 65,536 registers: four programs of 4 warps must fit.
        assert each["registers"] <= 65_536 // (4 * 4 * 32), each


def test_the_compiler_sees_what_each_kernel_writes_and_copies_nothing(compiled: Any) -> None:
    """What it does not see it takes for written, and it copies buffers that are views of one."""
    forward = [["means", "squares"], ["mean", "rstd"], ["y"]]
    backward = [["sums"], ["means", "dfilm", "dparameters"], ["dx"]]
    assert [sorted(each) for each in compiled["written"]] == [*map(sorted, forward + backward)]
    assert compiled["others"] == ["getitem", "new_empty.default", "permute.default"]


@pytest.mark.parametrize("channels", [128, 192, 256, 1024])
def test_maps_of_2048_pixels_fit_a_gpu_s_grid(channels: int) -> None:
    from trainer.adm.fused import Cut

    cut = Cut(16, channels, 2048**2, 32)
    for first, *others in (cut.by_tile, cut.by_part):
        assert first < 2**31 and max(others) < 2**16
