"""`--profile STEPS`: a trace that viewers read, and a table whose shares sum to the whole."""

import json
from pathlib import Path

import torch

from trainer import profiling


def test_steps_are_profiled_into_a_trace_and_a_table(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = profiling.StepProfiler(2, directory=tmp_path / "profile", log=said.append)
    x = torch.randn(1, 8, 16, 16)
    conv = torch.nn.Conv2d(8, 8, 3)
    for _ in range(9):
        conv(x).sum().backward()
        profiler.step()
    (trace,) = (tmp_path / "profile").glob("*.pt.trace.json")
    assert any("conv" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])
    rows = (tmp_path / "profile" / "table.txt").read_text().splitlines()[1:]
    assert any(row.startswith("convolution") for row in rows)
    assert len(said) == 1 and "profiled 2 steps" in said[0]


def test_the_table_is_by_kind_with_what_is_idle() -> None:
    times = [("sm90_xmma_fprop", 2.0), ("ncclDevKernel_AllReduce", 1.0), ("apply_gradient", 1.0)]
    rows = profiling.table(times, seconds=5.0, steps=10).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["convolution", "communication", "norm", "idle"]
    assert rows[1].endswith("40.0%") and rows[-1].endswith("20.0%")
