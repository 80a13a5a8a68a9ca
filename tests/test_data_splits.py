"""Files of several splits, or only some of a split, are not packed as if they were a dataset."""

from collections import Counter
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.dataset import Shards, open_shards
from data.pack import pack
from data.packing.begun import Request
from data.packing.indexing import index_directory
from data.packing.listing import by_directory_name
from data.packing.plan import PackConfig
from data.packing.splits import Split, split_of
from tests.support.data_fixtures import content, image_file, packed, write_folder, write_tars


def write_parquet(root: Path, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        table = pa.table({"image": [image_file(i, width=20, height=20)], "label": [i]})
        parquet.write_table(table, root / name)
    return root


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


def split(source: Path, out: Path, which: Split, share: float | None = None) -> Shards:
    """One split of a source, packed at 16 pixels."""
    config = PackConfig(size=16, per_shard=9, split=which, val_share=share)
    pack(Request(str(source), config), out=out)
    return open_shards(out)


@pytest.mark.parametrize(("share", "held_out"), [(None, 2), (0.35, 5), (0.001, 1), (0.999, 14)])
def test_splits_share_a_source_and_no_image(
    tmp_path: Path, share: float | None, held_out: int
) -> None:
    source = write_folder(tmp_path / "source", images=45)
    whole = packed(source, tmp_path)
    train, val = (split(source, tmp_path / one, one, share) for one in get_args(Split))
    assert content(train) | content(val) == content(whole)
    assert train.count + val.count == whole.count == 45
    assert Counter(label for _, label in content(val)) == dict.fromkeys(range(3), held_out)
    assert train.classes == val.classes == whole.classes


def test_a_source_that_grows_keeps_its_splits(tmp_path: Path) -> None:
    listing = by_directory_name([f"{i}.jpg" for i in range(400)], ["a", "b"] * 200)
    first = by_directory_name(listing.names[:300], ["a", "b"] * 150)
    before, after = (set(split_of(each, "val", held_out=0.1).names) for each in (first, listing))
    assert len(before) == 30 and len(after) == 40
    assert len(before - after) <= 6


def test_splits_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=3)
    with pytest.raises(ValueError, match=r"--split val: no class has two images"):
        split(source, tmp_path / "out", "val")
    with pytest.raises(ValueError, match=r"--val-share = 0.2: must be absent without --split"):
        PackConfig(size=16, val_share=0.2)
    with pytest.raises(ValueError, match=r"--val-share = 1: must be above 0 and below 1"):
        PackConfig(size=16, split="val", val_share=1)
    split(write_folder(source, images=30), tmp_path / "out", "val")
    with pytest.raises(ValueError, match=r"holds another dataset"):
        split(source, tmp_path / "out", "train")
