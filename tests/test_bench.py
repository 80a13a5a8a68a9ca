"""The benchmarks of the training step run themselves small on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cpu_step, gpu
from tests.support import ranks


def test_every_cell_is_a_process_and_a_line_of_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    assert gpu.main(["--out", str(out), "--sizes", "64", "--most", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["ceilings", "norm"]
    assert all(row["device"] and row["commit"] for row in rows)
    assert rows[0]["copy GB/s"] > 0


def test_a_cell_beyond_its_deadline_or_that_fails_does_not_end_the_others() -> None:
    assert "took more than" in gpu.measure({"kind": "ceilings"}, limit=0.01)["error"]
    assert "no guided_diffusion/unet.py" in gpu.measure(
        {"kind": "step", "system": "guided-diffusion", "path": "nowhere", "precision": "fp32"},
        limit=ranks.LIMIT,
    )["error"]  # fmt: skip


def test_a_step_is_measured_and_shown() -> None:
    cell = {"kind": "step", "system": "ours", "size": 64, "precision": "fp32", "images": 2}
    command = [sys.executable, "-m", "bench.gpu", "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ranks.LIMIT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images/s"] > 0
    rows = [{"kind": "ceilings", "fp32 TFLOP/s": 1.0}, {**cell, **found}]
    assert "| 64 | ours | fp32 | 2 |" in gpu.table(rows)


def test_the_step_on_a_cpu_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.cells import SMALL

    monkeypatch.setattr(cpu_step, "CONFIG", SMALL)
    assert cpu_step.main(["--rounds", "1", "--images", "1"]) == 0
    assert "ours, channels first" in capsys.readouterr().out
