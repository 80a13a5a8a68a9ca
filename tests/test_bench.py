"""The benchmarks of the training step run themselves small on a CPU."""

import json
from pathlib import Path

import pytest

from bench import cells, cpu_step, gpu


def test_every_cell_is_a_process_and_a_line_of_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    assert gpu.main(["--out", str(out), "--sizes", "64", "--most", "1"]) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["kind"] == "ceilings" and row["device"] and row["commit"] and row["copy GB/s"] > 0
    assert "took more than" in gpu.measure({"kind": "ceilings"}, limit=0.01)["error"]


@pytest.mark.parametrize("kind", ["norm", "attention", "guided"])
def test_every_kind_of_cell_gives_figures(kind: str) -> None:
    cell = {"system": "ours", "size": 64, "precision": "fp32", "images": 2, "kernels": "plain"}
    found = cells.KINDS[kind]({**cell, "shape": (64, 8, 2)})
    assert found and all(float(value) > 0 for value in found.values())


def test_a_step_is_measured_and_shown() -> None:
    cell = {"kind": "step", "system": "ours", "size": 64, "precision": "fp32", "images": 2}
    found = cells.step(cell)
    assert found["images/s"] > 0
    rows = [{"kind": "ceilings", "fp32 TFLOP/s": 1.0}, {**cell, **found}]
    assert "| 64 | ours | fp32 | 2 |" in gpu.table(rows)


def test_the_step_on_a_cpu_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_step, "CONFIG", cells.SMALL)
    assert cpu_step.main(["--rounds", "1", "--images", "1"]) == 0
    assert "ours, channels first" in capsys.readouterr().out
