"""The benchmarks of the training step run themselves small on a CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cells, cpu_step, follow, gpu, nets, scale
from tests.support import golden, ranks
from tests.support.ranks import LIMIT
from tests.test_plan import machine
from trainer import diffusers_format
from trainer.adm.config import UNetConfig
from trainer.adm.unet import build
from trainer.config import experiment as configs


def test_every_cell_is_a_process_and_a_line_of_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    assert gpu.main(["--out", str(out), "--sizes", "64", "--most", "1"]) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["kind"] == "ceilings" and row["device"] and row["commit"] and row["copy GB/s"] > 0
    late = gpu.measure(gpu.waiting(), {"kind": "ceilings"}, limit=0.01)
    assert "took more than" in late["error"]
    wrong = gpu.measure(gpu.waiting(), {"kind": "nothing"}, limit=LIMIT)
    assert wrong == {"error": "KeyError: 'nothing'"}


def test_what_a_cell_could_not_do_is_refused_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "figures.jsonl"), "--most", "0"]
    for words, said in {
        (*out, "--guided-diffusion", str(tmp_path)): "has no guided_diffusion/unet.py",
        ("--out", str(tmp_path / "none" / "figures.jsonl")): "none/figures.jsonl: No such file",
        (*out, "--sizes", "32"): "invalid choice: 32",
    }.items():
        with pytest.raises(SystemExit):
            gpu.main(words)
        assert said in capsys.readouterr().err.replace("'", "")  # Python 3.14 quotes the choice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"PATH": tmp_path, "TRITON_CACHE_DIR": tmp_path, "CC": ""}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        gpu.main(out)
    assert "needs a C compiler" in capsys.readouterr().err


def test_cells_find_the_toolkit_of_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert gpu.environment()["CUDA_HOME"] == str(nvcc.parents[1])
    monkeypatch.setenv("CUDA_HOME", "/own")
    assert gpu.environment()["CUDA_HOME"] == "/own"


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


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_a_measured_step_multiplies_no_zeros_nor_what_fp16_cannot_hold(name: str) -> None:
    net = cells.system({"system": name, "size": 64, "precision": "fp32"})
    inputs = nets.inputs(cells.SMALL, images=4, device=torch.device("cpu"))
    cells.loss(net.forward(*inputs)).backward()
    for key, parameter in net.module.named_parameters():
        assert parameter.grad is not None
        # The norm that follows takes biases away.
        if parameter.dim() > 1:
            assert 1e-3 < float(parameter.grad.abs().max()) < 1e4, key


@pytest.mark.parametrize("name", nets.DOUBLED)
def test_other_ways_to_convolve_a_doubled_map_give_the_same_network(name: str) -> None:
    config = replace(cells.SMALL, channel_mult=(1, 1, 2), attention=())
    inputs = nets.inputs(config, images=3, device=torch.device("cpu"))
    found = []
    for doubled in (None, nets.DOUBLED[name]):
        torch.manual_seed(0)
        net = nets.ours(config, doubled=doubled)
        module = net.module.double()
        torch.nn.init.normal_(module.out[-1].weight)
        out = net.forward(*inputs)
        assert out.abs().max() > 1
        found.append((out, *torch.autograd.grad(out.square().sum(), [*module.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_runs_follow_guided_diffusions_own_training(tmp_path: Path, digits: Path) -> None:
    """Two ranks, two micro-batches a step and ZeRO-2, against what its code came to, recorded."""
    recorded, runs, starts = golden.table("training_loops"), [], {}
    for preset, want in recorded.items():
        sets = follow.settings(preset, shards=digits, steps=len(want["losses"]))
        net = build(configs.load(preset, sets).model)
        starts[preset] = follow.initial({k: p.shape for k, p in net.named_parameters()})
        torch.save(starts[preset], tmp_path / f"{preset}.pt")
        words = [preset, *follow.changes(sets), "--init", str(tmp_path / f"{preset}.pt")]
        runs.append(["train", *words, "--run", str(tmp_path / preset)])
    assert len(runs) == 2
    job = ranks.start(tmp_path / "job", ranks=2, runs=runs)
    job.wait()
    assert job.statuses == [0, 0]
    for preset, want in recorded.items():
        got = follow.of_run(tmp_path / preset)
        assert got.losses == pytest.approx(want["losses"], rel=1e-4)
        for name, (moved, *along) in want["sketches"].items():
            mine, *mine_along = follow.sketch(got.last[name], start=starts[preset])
            assert mine == pytest.approx(moved, rel=1e-3)
            assert mine_along == pytest.approx(along, abs=0.02 * moved)


def test_following_wants_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        follow.main(["--guided-diffusion", str(tmp_path)])
    assert f"{tmp_path} has no scripts/classifier_train.py" in capsys.readouterr().err


def test_another_network_than_ours_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    options = diffusers_format.options
    types = {"downsample_type": "conv", "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
    monkeypatch.setattr(diffusers_format, "options", lambda config: options(config) | types)
    with pytest.raises(ValueError, match="diffusers has another network than ours: down_blocks"):
        nets.diffusers(cells.SMALL)


def test_a_peer_is_measured_as_published_and_compiled_in_both_layouts() -> None:
    found = list(gpu.cells(sizes=[64], guided_diffusion=Path("there"), gpu=True))
    steps = {(cell["system"], cell["images"]) for cell in found if cell["kind"] == "step"}
    peers = ("guided-diffusion", "diffusers, compiled", "diffusers, compiled, channels last")
    for name in (gpu.BEST, "guided-diffusion, compiled", *peers):
        assert {(name, gpu.EQUAL[64]), (name, gpu.LARGEST[64])} <= steps


def test_diffusers_is_measured_where_it_can_be_the_published_network() -> None:
    found = gpu.cells(sizes=list(gpu.EQUAL), guided_diffusion=None, gpu=True)
    sizes = {cell["size"] for cell in found if "diffusers" in cell.get("system", "")}
    with torch.device("meta"):
        for size in gpu.EQUAL:
            model = configs.load(f"imagenet{size}").model
            assert isinstance(model, UNetConfig)
            if size in sizes:
                nets.diffusers(model)
            else:
                with pytest.raises(ValueError, match="for diffusers, which has no other"):
                    nets.diffusers(model)


def test_the_step_on_a_cpu_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_step, "CONFIG", cells.SMALL)
    assert cpu_step.main(["--rounds", "1", "--images", "1"]) == 0
    out = capsys.readouterr().out
    assert "ours, channels first" in out and "diffusers, channels last" in out
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cpu_step.main(["--rounds", "1", "--images", "1"]) == 0
    assert capsys.readouterr().out.count("diffusers") == len(["is left out", "pip install"])


def test_costs_are_extrapolated_on_a_line_that_never_falls() -> None:
    rows = [{"ranks": n, **dict.fromkeys(scale.COSTS, 1.0 + n / 4)} for n in (2, 4, 8)]
    assert [row["value"] for row in scale.extrapolated(rows, ranks=512)] == pytest.approx([129] * 3)
    rows = [{"ranks": n, **dict.fromkeys(scale.COSTS, 9.0 - n)} for n in (2, 4)]
    assert [row["value"] for row in scale.extrapolated(rows, ranks=512)] == pytest.approx([6] * 3)


def test_the_step_that_was_measured_is_what_the_prediction_starts_from(tmp_path: Path) -> None:
    config, file = configs.load("imagenet64"), tmp_path / "gpu.jsonl"
    row = {"kind": "step", "system": gpu.BEST, "size": 64, "precision": "fp16"}
    rows = [
        {**row, "images": 256, "images/s": 700.0, "model TFLOP/s": 460.0},
        {**row, "images": 4, "images/s": 200.0, "model TFLOP/s": 131.0},
        {**row, "images": 512, "error": "took more than 240 s"},
    ]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    there = scale.measured_step(machine(), config=config, file=file)
    assert (there.mfu, there.host_ms) == pytest.approx((460 / 989, 20.0))
    with pytest.raises(ValueError, match="no step of 128 px"):
        scale.measured_step(machine(), config=configs.load("imagenet128"), file=file)


@pytest.mark.slow
def test_scaling_is_predicted_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scale.jsonl"
    words = ["--ranks", "1", "2", "--images", "60", "--seconds", "0.5", "--out", str(out)]
    assert scale.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert {"data", "job", "extrapolated"} <= set(kinds) and kinds.count("job") == 2
    assert all(value > 0 for row in rows if row["kind"] == "job" for value in [row["start_s"]])
    assert "predicted, 8 x 400 Gb/s per node" in capsys.readouterr().out


@pytest.mark.slow
def test_what_the_host_does_is_measured_by_part() -> None:
    # DeepSpeed stays in a process of its own.
    words = (sys.executable, "-m", "bench.host", "digits", "--rounds", "2")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    around, ours = rows[0], next(row for row in rows if row["part"] == "network, ours")
    assert (
        around["step ms"] > 0 and min(ours["operations forward"], ours["operations backward"]) > 0
    )
    assert "ms of the host, a step" in done.stdout
