"""Files of several splits, or only some of a split, are not packed as if they were a dataset."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.packing.indexing import index_directory
from tests.support.data_fixtures import image_file, packed, write_folder, write_tars


def write_parquet(root: Path, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        table = pa.table({"image": [image_file(i, width=20, height=20)], "label": [i]})
        parquet.write_table(table, root / name)
    return root


def test_train_and_test_parquet_do_not_mix(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "P", "train.parquet", "test.parquet")
    message = r"holds the splits test, train: give one, such as '.*/P/\*train\*\.parquet'"
    with pytest.raises(ValueError, match=message):
        packed(source, tmp_path)
    assert packed(source / "*train*.parquet", tmp_path / "a").count == 1
    assert packed(source / "test.parquet", tmp_path / "b").count == 1


def test_timms_train_and_validation_tars_do_not_mix(tmp_path: Path) -> None:
    tars = write_tars(write_folder(tmp_path / "folder", images=20), tmp_path / "tars")
    (tars / "other-000.tar").rename(tars / "imagenet1k-train-0000.tar")
    (tars / "other-001.tar").rename(tars / "imagenet1k-validation-00.tar")
    with pytest.raises(ValueError, match=r"splits train, validation: .*/\*train\*\.tar'"):
        packed(tars, tmp_path)
    with pytest.raises(ValueError, match=r"splits train, validation: move each"):
        index_directory(tars)
    assert packed(tars / "*train*.tar", tmp_path / "a").count == 13


def test_a_split_that_was_downloaded_in_part_is_refused(tmp_path: Path) -> None:
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    source = write_parquet(tmp_path / "P", *names)
    assert packed(source, tmp_path / "all").count == 3
    (source / names[1]).unlink()
    missing = r"P: 1 files are missing, such as train-00001-of-00003\.parquet"
    for path in (source, source / "train-*.parquet"):
        with pytest.raises(ValueError, match=missing):
            packed(path, tmp_path)
    assert packed(source / names[0], tmp_path / "one").count == 1
    assert packed(source / "train-*[02]-of-*.parquet", tmp_path / "two").count == 2


def test_numbers_that_begin_with_one_are_complete(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "P", "a-1-of-2.parquet", "a-2-of-2.parquet")
    assert packed(source, tmp_path).count == 2


def test_names_with_checksums_are_complete(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "P", "a-0-of-2-f3.parquet", "a-1-of-2-9c.parquet")
    assert packed(source, tmp_path).count == 2


def test_the_tars_of_img2dataset_are_packed_and_not_their_metadata(tmp_path: Path) -> None:
    tars = write_tars(write_folder(tmp_path / "folder", images=30), tmp_path / "tars")
    for tar in list(tars.glob("*.tar")):
        parquet.write_table(pa.table({"url": ["x"], "label": [9]}), tar.with_suffix(".parquet"))
        tar.with_name(f"{tar.stem}_stats.json").write_text("{}")
    assert packed(tars, tmp_path).count == 30
