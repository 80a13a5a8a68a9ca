"""Networks with classes train on labelled images only, and the log says on which."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.dataset import Shards, open_shards
from data.manifest import manifest_text
from data.pack import pack
from data.packing.begun import Request
from data.packing.indexing import index_directory
from data.packing.plan import PackConfig
from tests.support import ranks
from tests.support.data_fixtures import image_file
from trainer.classes import untrained
from trainer.config import experiment as configs
from trainer.run.directory import Run
from trainer.train import TrainingPlan, parser

IMAGES = 12


def png(i: int) -> bytes:
    return image_file(i, width=8, height=8, kind="PNG")


def folder(root: Path, names: Callable[[int], str]) -> Path:
    """A folder of images with these names."""
    for i in range(IMAGES):
        path = root / "source" / names(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return root / "source"


def packed(source: Path | str, root: Path) -> Shards:
    pack(Request(str(source), PackConfig(size=8)), out=root / "shards")
    return open_shards(root / "shards")


def tars(root: Path, *, suffix: str, texts: list[str]) -> Path:
    """Two tars of images, each with a file of another suffix beside it."""
    source = folder(root / "files", lambda i: f"{i}.png")
    (root / "tars").mkdir()
    for part in range(2):
        with tarfile.open(root / "tars" / f"{part}.tar", "w") as tar:
            for i in range(part, IMAGES, 2):
                (source / f"{i}.{suffix}").write_text(texts[i])
                for name in (f"{i}.{suffix}", f"{i}.png"):
                    tar.add(source / name, arcname=name)
    return root / "tars"


def flat_folder(root: Path) -> Shards:
    return packed(folder(root, lambda i: f"cat_{i}.png"), root)


def images_beside_the_class_folders(root: Path) -> Shards:
    """As the last release packed them; today that is refused."""
    shards = packed(folder(root, lambda i: f"n{i % 3}/{i}.png"), root)
    classes = ("", *shards.classes[1:])
    text = manifest_text(shards.shards, classes=classes, image_size=8, made_by={})
    (Path(shards.root) / "manifest.json").write_text(text)
    return open_shards(shards.root)


def one_folder(root: Path) -> Shards:
    return packed(folder(root, lambda i: f"images/{i}.png"), root)


def packed_tars_without_labels(root: Path) -> Shards:
    return packed(tars(root, suffix="txt", texts=IMAGES * ["a cat"]), root)


def indexed_tars_without_labels(root: Path) -> Shards:
    return index_directory(tars(root, suffix="txt", texts=IMAGES * ["a cat"]))


def indexed_tars_that_all_say_0(root: Path) -> Shards:
    return index_directory(tars(root, suffix="cls", texts=IMAGES * ["0"]))


def parquet_without_labels(root: Path) -> Shards:
    table = pa.table({"image": [png(i) for i in range(IMAGES)]})
    parquet.write_table(table, root / "train-0.parquet")
    return packed(root / "train-0.parquet", root)


def make(run: Path, preset: Path | str, shards: Shards, *changes: str) -> TrainingPlan:
    sets = [f'data.shards = "{shards.root}"', "data.streams = 4", *changes]
    words = [word for change in sets for word in ("--set", change)]
    return TrainingPlan.make(parser().parse_args([str(preset), "--run", str(run), *words]), ranks=1)


@pytest.mark.parametrize(
    ("dataset", "lack"),
    [
        (flat_folder, "the images have no labels"),
        (images_beside_the_class_folders, "some images have no label"),
        (one_folder, "all images have the same label, 'images'"),
        (packed_tars_without_labels, "the images have no labels"),
        (indexed_tars_without_labels, "the images have no labels"),
        (indexed_tars_that_all_say_0, "all images have the same label, '0'"),
        (parquet_without_labels, "the images have no labels"),
    ],
)
def test_training_classes_on_images_without_labels_is_refused(
    tmp_path: Path, tiny: Path, dataset: Callable[[Path], Shards], lack: str
) -> None:
    shards = dataset(tmp_path)
    with pytest.raises(ValueError) as raised:
        make(tmp_path / "run", tiny, shards)
    assert f"{shards.root}: {lack}" in str(raised.value)
    assert "model.num_classes = 10: pack the images again" in str(raised.value)
    assert "--unset model.num_classes" in str(raised.value)
    with pytest.raises(ValueError) as raised:
        make(tmp_path / "run", "digits_classifier", shards)
    assert lack in str(raised.value) and "--unset" not in str(raised.value)


def test_training_one_class_on_images_without_labels_is_refused_too(
    tmp_path: Path, tiny: Path
) -> None:
    with pytest.raises(ValueError, match=r"no labels, but model\.num_classes = 1"):
        make(tmp_path / "run", tiny, flat_folder(tmp_path / "flat"), "model.num_classes = 1")
    make(tmp_path / "run", tiny, one_folder(tmp_path / "one"), "model.num_classes = 1")


def test_training_without_classes_needs_no_labels(tmp_path: Path, tiny: Path, digits: Path) -> None:
    preset = tmp_path / "unconditional.toml"
    preset.write_text(tiny.read_text().replace("num_classes = 10\n", ""))
    for shards in (flat_folder(tmp_path), open_shards(digits)):
        assert make(tmp_path / "run", preset, shards).config.model.num_classes is None


def test_resuming_a_run_that_was_trained_without_labels_says_to_start_another(
    tmp_path: Path, tiny: Path
) -> None:
    shards, run = flat_folder(tmp_path), Run(tmp_path / "run")
    (run.checkpoints / f"{8:012d}").mkdir(parents=True)
    changes = [f'data.shards = "{shards.root}"', "data.streams = 4"]
    run.config_file.write_text(configs.to_toml(configs.load(tiny, changes)))
    with pytest.raises(ValueError, match=r"run was trained on these shards: start another run"):
        make(run.path, tiny, shards)


def test_indexing_tars_of_which_some_have_no_labels_is_refused(tmp_path: Path) -> None:
    root = tars(tmp_path, suffix="cls", texts=[str(i) for i in range(IMAGES)])
    plain = tars(tmp_path / "plain", suffix="txt", texts=IMAGES * [""])
    shutil.copy(plain / "1.tar", root / "1.tar")
    with pytest.raises(ValueError, match=r"1\.tar has no labels, and .*0\.tar has"):
        index_directory(root)


def test_training_on_fewer_classes_than_the_network_has_is_in_the_log(
    tmp_path: Path, tiny: Path, digits: Path
) -> None:
    run = ["train", str(tiny), "--run", str(tmp_path / "run"), "--set", "training.images = 8"]
    job = ranks.start(tmp_path / "job", ranks=1, runs=[[*run, "--set", "model.num_classes = 12"]])
    job.wait()
    assert job.statuses == [0]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{digits} has 10 classes, the network 12: classes 10 to 11 are never trained, " in log
    assert "else set model.num_classes to 10" in log
    assert "starts: denoise" in log and "1,797 images in 10 classes, 0.0 epochs" in log
    shards, one_more = open_shards(digits), configs.load(tiny, ["model.num_classes = 11"])
    assert "the network 11: class 10 is never trained" in untrained(one_more, shards)
    assert untrained(configs.load(tiny), shards) == ""
