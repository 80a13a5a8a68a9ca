"""The examples: their presets fit each other and their data, and the scripts are valid."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.dataset import open_shards
from data.pack import main as pack
from trainer.config import experiment as configs
from trainer.networks import TrainedNetwork
from trainer.sampling.fit import check_enlarges, check_guides
from trainer.train import TrainingPlan, parser

EXAMPLES = Path(__file__).parent.parent / "examples"
PHOTOS = ("photos16", "photos16_classifier", "photos16_32")
SUBJECTS = runpy.run_path(str(EXAMPLES / "photos.py"))["SUBJECTS"]


def network(preset: str) -> TrainedNetwork:
    """A network of an example's preset, as if it were trained."""
    path = EXAMPLES / f"{preset}.toml"
    return TrainedNetwork(configs.load(path), file=path, sha256="", name=preset)


def test_the_networks_fit_each_other_and_the_classifier_sees_random_crops() -> None:
    base, classifier, upsampler = map(network, PHOTOS)
    check_guides(classifier, network=base)
    classes = base.config.model.num_classes
    assert classes == len(SUBJECTS)
    check_enlarges(upsampler, base=base, classes=classes)
    crops = [each.config.data.crop for each in (base, classifier, upsampler)]
    assert crops == ["center", "random", "center"]


def run(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_photographs_are_cut_packed_and_fit_every_preset(tmp_path: Path) -> None:
    photos = tmp_path / "jpegs"
    run(sys.executable, EXAMPLES / "photos.py", photos, "--images", 8)
    files = sorted(photos.rglob("*.*"))
    assert [f.suffix for f in files] == [".jpg"] * 8 * len(SUBJECTS)
    content = files[-1].read_bytes()
    files[-1].unlink()
    run(sys.executable, EXAMPLES / "photos.py", photos, "--images", 8)
    assert files[-1].read_bytes() == content
    sizes = {Image.open(file).size for file in files}
    assert min(min(size) for size in sizes) >= 40 and len(sizes) > 20
    train, val = (str(tmp_path / split) for split in ("train", "val"))
    options = ["--size", "40", "--keep-original", "--exif-transpose", "--workers", "1", "--split"]
    assert pack([str(photos), train, *options, "train"]) == 0
    assert pack([str(photos), val, *options, "val"]) == 0
    assert open_shards(train).classes == tuple(SUBJECTS)
    assert (open_shards(train).count, open_shards(val).count) == (7 * 6, 6)
    sets = [f'data.shards = "{train}"', f'data.validation = "{val}"']
    for preset in PHOTOS:
        named = [str(EXAMPLES / f"{preset}.toml"), "--run", str(tmp_path / preset)]
        changes = [word for each in sets for word in ("--set", each)]
        arguments = parser().parse_args([*named, *changes])
        plan = TrainingPlan.make(arguments, ranks=2)
        assert plan.validation is not None and plan.validation.images == 6


def test_the_curve_shows_training_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is started from a notebook whose backend is not installed here."""
    monkeypatch.setenv("MPLBACKEND", "none")
    rows = [{"images": 8 * i, "loss": 1 / i, "validation/acc1": i / 10} for i in range(1, 9)]
    rows[-1]["validation/loss"] = 0.25
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    said = run(sys.executable, EXAMPLES / "curve.py", tmp_path / "curve.png", tmp_path / "run")
    assert "64 images, loss 0.1250, validation loss 0.2500, validation accuracy 80.0%" in said
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 16)) > 20
    smoothed = runpy.run_path(str(EXAMPLES / "curve.py"))["smoothed"]
    assert smoothed([0.5] * 9) == pytest.approx([0.5] * 9)


@pytest.mark.parametrize("script", ["quickstart.sh", "photos.sh"])
def test_the_scripts_are_valid(script: str) -> None:
    run("bash", "-n", EXAMPLES / script)
    if shutil.which("shellcheck"):
        run("shellcheck", "--external-sources", "--severity", "warning", EXAMPLES / script)
