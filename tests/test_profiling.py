"""`--profile STEPS`: a trace that viewers read, and a table whose shares sum to the whole."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from trainer import profiling
from trainer.run.directory import Run


def profile(run: Path, *, steps: int = 9) -> None:
    """Profile two steps of a run of so many."""
    x = torch.randn(1, 8, 16, 16)
    conv = torch.nn.Conv2d(8, 8, 3)
    with (
        Run(run).claimed() as claimed,
        profiling.profiled(2, run=claimed, is_main=True) as step,
    ):
        for _ in range(steps):
            conv(x).sum().backward()
            step()


def test_steps_are_profiled_into_a_trace_and_a_table(tmp_path: Path) -> None:
    profile(tmp_path)
    (trace,) = (tmp_path / "profile").glob("*.pt.trace.json")
    assert any("conv" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])
    rows = (tmp_path / "profile" / "table.txt").read_text().splitlines()[1:]
    assert any(row.startswith("convolution") for row in rows)
    assert (tmp_path / "log.txt").read_text().count("profiled 2 steps") == 1


def test_the_time_that_the_profiler_takes_itself_is_not_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.profiler.profile.stop_trace

    def stop(profiler: torch.profiler.profile) -> None:
        whole(profiler)
        time.sleep(2.0)

    monkeypatch.setattr(torch.profiler.profile, "stop_trace", stop)
    profile(tmp_path)
    rows = (tmp_path / "profile" / "table.txt").read_text().splitlines()[1:]
    seconds = 2 * sum(float(row[23:35]) for row in rows) / 1e3
    assert seconds < 1.0  # of two steps, of milliseconds each


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_a_run_that_ends_before_its_profile_says_so_and_writes_what_there_is(
    tmp_path: Path, steps: int
) -> None:
    profile(tmp_path, steps=steps)
    said = f"--profile 2: {max(steps - 5, 0)} steps were profiled: this start ended after {steps}"
    assert (tmp_path / "log.txt").read_text().count(said) == 1
    written = [*tmp_path.glob("profile/*.pt.trace.json"), *tmp_path.glob("profile/table.txt")]
    assert len(written) == (2 if steps > 5 else 0)


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").touch()  # in place of the directory
    profile(tmp_path)
    assert "cannot write profile/ of" in capsys.readouterr().out


def test_the_table_is_by_kind_with_what_is_idle() -> None:
    times = [("sm90_xmma_fprop", 2.0), ("ncclDevKernel_AllReduce", 1.0), ("apply_gradient", 1.0)]
    rows = profiling.table(times, seconds=5.0, steps=10).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["convolution", "communication", "norm", "idle"]
    assert rows[1].endswith("40.0%") and rows[-1].endswith("20.0%")


def test_annotations_of_a_device_are_not_counted_beside_their_kernels() -> None:
    kinds = {"triton_poi_fused_convolution_7": False, "sm90_xmma_fprop_implicit_gemm": False}
    kinds |= {"Optimizer.step#AdamW.step": True, "## Call CompiledFxGraph ##": True}
    on_device = [
        FunctionEvent(
            n, name, n, 0, 2_000_000, stack=[], use_device="cuda",
            device_type=DeviceType.CUDA, is_user_annotation=named,
        )
        for n, (name, named) in enumerate(kinds.items())
    ]  # fmt: skip
    host = FunctionEvent(9, "aten::conv2d", 1, 0, 9_000_000, device_type=DeviceType.CPU, stack=[])
    events = EventList([*on_device, host], use_device="cuda")
    events._build_tree()
    times = profiling._times(events.key_averages(), of_device=True)
    assert {(profiling.kind(name), seconds) for name, seconds in times} == {
        ("elementwise, compiled", 2.0), ("convolution", 2.0)
    }  # fmt: skip
