"""The figures of a sweep over scales: all samples in one command, and one picture."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import ranks
from tests.support.exported import refused
from trainer.evaluate import main
from trainer.evaluation import plots
from trainer.sampling.samplefile import open_samples

SCALES = (0.0, 0.25, 0.5)


def drawn(path: Path, images: np.ndarray, **request: Any) -> Path:
    """A sample file that says how it was drawn."""
    text = json.dumps({"scale": 0.0, "cfg": None, "low_res": None, **request})
    np.savez(path, arr_0=images, request=text)
    return path


def test_a_sweep_is_evaluated_in_one_command_and_shown_in_one_picture(
    network: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    samples = open_samples(digits)
    images = samples.images(0, 300).astype(float)
    noise = np.random.default_rng(0).normal(size=images.shape)
    names = {scale: tmp_path / f"samples-scale{scale:g}.npz" for scale in SCALES}
    for scale, path in names.items():
        noisy = (images + 120 * scale * noise).clip(0, 255).astype(np.uint8)
        drawn(path, noisy, scale=scale)
    plot, common = tmp_path / "sweep.png", ["--reference", str(digits), "--network", str(network)]
    as_listed = [str(names[scale]) for scale in reversed(SCALES)]
    assert main([*as_listed, "--plot", str(plot), *common]) == 0
    found = [
        json.loads((tmp_path / f"samples-scale{s:g}.evaluation.json").read_text()) for s in SCALES
    ]
    fids = [each["figures"]["fid_300"]["value"] for each in found]
    assert fids == sorted(fids) and fids[0] < fids[2] / 2
    with Image.open(plot) as picture:
        assert picture.size == (1500, 540)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    said = capsys.readouterr().out
    assert said.count("features of 300 images") == len(SCALES)
    rows = [line.split()[1] for line in said.splitlines() if line.startswith("|")]
    assert rows == ["samples", "---", *(str(names[scale]) for scale in SCALES)]


def test_the_scales_of_an_enlarged_sweep_are_those_in_the_names(tmp_path: Path) -> None:
    images = np.zeros((16, 8, 8, 3), np.uint8)
    scales = [-1.0, 0.0, 0.5, 1e-5]
    paths = [drawn(tmp_path / f"a-scale2-scale{s:g}.npz", images, low_res="x") for s in scales]
    assert plots.scales_of([open_samples(path) for path in paths]) == ("scale", scales)


def test_a_picture_needs_no_backend_of_a_notebook_that_starts_a_command(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from trainer.evaluation.plots import Bar, ablation; "
        "ablation(Path('bars.png'), [Bar('base', '', None)], figure='fid', curves={})"
    )
    env = {**os.environ, "MPLBACKEND": "none", "PYTHONPATH": str(ranks.ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env).returncode == 0
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"


def test_what_cannot_be_shown_is_refused_before_anything_is_computed(
    network: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_samples(digits).images(0, 20)
    plain = tmp_path / "plain.npz"
    np.savez(plain, arr_0=images)
    a, b = (drawn(tmp_path / f"{i}.npz", images, scale=float(i)) for i in range(2))
    again = drawn(tmp_path / "again.npz", images, scale=1.0)
    other = drawn(tmp_path / "other.npz", images, scale=2.0, cfg=3.0)
    few = drawn(tmp_path / "few.npz", images[:18], scale=2.0)
    names = ("up-scale0.npz", "upper-scale0.npz")
    enlarged = [drawn(tmp_path / name, images, low_res="x") for name in names]
    plot, common = ["--plot", str(tmp_path / "new" / "p.png")], ["--reference", str(digits)]
    cases = [
        ([a, plain, *plot], "does not say how it was drawn"),
        ([a, b, again, *plot], "two of the samples have the same --scale"),
        ([a, other, *plot], "differ in --scale or in --cfg: both differ"),
        ([a, *plot], "neither differ"),
        ([*enlarged, *plot], "neither differ"),
        ([a, few, *plot], "samples of different numbers"),
        ([a, b, "--out", tmp_path / "o.json"], "absent with 2 samples"),
        ([a, b, "--plot", tmp_path / "p.gif"], "--plot = .*: must be a file in .png, .pdf, .svg"),
    ]
    common += ["--network", str(network)]
    for words, said in cases:
        refused([*map(str, words), *common], said)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused([str(a), str(b), *plot, *common], "--plot: needs matplotlib: pip install matplotlib")
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "new").exists()
