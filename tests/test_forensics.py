"""What a run leaves when memory runs out, and what `training.deterministic` sets."""

from pathlib import Path

import pytest
import torch

from trainer import determinism
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
    finally:
        determinism.apply(False)
    assert not torch.are_deterministic_algorithms_enabled()
