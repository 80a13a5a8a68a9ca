"""The same images through every kind of source."""

import io
import json
import zipfile
from pathlib import Path

import lmdb
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data.config import DataConfig
from data.dataset import open_shards
from data.exits import FAILED, REFUSED
from data.pack import main, pack
from data.packing.begun import Request
from data.packing.kinds import open_source
from data.packing.plan import PackConfig
from data.packing.tars import scan_tar
from data.shards import main as shards_main
from data.stream import Stream
from tests.support.data_fixtures import (
    content,
    image_file,
    image_files,
    packed,
    write_folder,
    write_tar,
    write_tars,
    zipped,
)
from tests.support.faults import full_disk

IMAGES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sources") / "folder", images=IMAGES)


@pytest.fixture(scope="module")
def wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[bytes, int]]:
    return content(packed(folder, tmp_path_factory.mktemp("wanted")))


def write_parquet(folder: Path, out: Path) -> Path:
    out.mkdir()
    names = ["zebra", "ant", "mole"]  # an order that sorting would lose
    feature = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    rows = image_files(folder)
    for part in range(2):
        half = rows[part::2]
        images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in half]
        table = pa.table({"image": images, "label": [label for _, label in half]})
        table = table.replace_schema_metadata(metadata)
        parquet.write_table(table, out / f"train-{part}.parquet", row_group_size=4)
    return out


def test_a_zip_packs_like_its_folder(
    folder: Path, wanted: set[tuple[bytes, int]], tmp_path: Path
) -> None:
    shards = packed(zipped(folder, tmp_path / "images.zip"), tmp_path)
    assert content(shards) == wanted
    # The same names and bytes: the very same dataset.
    assert shards.fingerprint == packed(folder, tmp_path / "again").fingerprint


@pytest.mark.parametrize("json_labels", [False, True])
def test_webdataset_shards_pack_with_their_labels(
    folder: Path, wanted: set[tuple[bytes, int]], tmp_path: Path, json_labels: bool
) -> None:
    tars = write_tars(folder, tmp_path / "tars", json_labels=json_labels)
    (tars / "._other-000.tar").write_bytes(b"litter of macOS")
    shards = packed(tars, tmp_path)
    assert content(shards) == wanted and shards.classes == ("0", "1", "2")


def test_parquet_packs_with_its_class_names(
    folder: Path, wanted: set[tuple[bytes, int]], tmp_path: Path
) -> None:
    shards = packed(write_parquet(folder, tmp_path / "parquet"), tmp_path)
    assert content(shards) == wanted and shards.classes == ("zebra", "ant", "mole")
    assert not list(Path(shards.root).glob("*.blob"))


def test_lmdb_packs_as_one_class(
    folder: Path, wanted: set[tuple[bytes, int]], tmp_path: Path
) -> None:
    with (
        lmdb.open(str(tmp_path / "cat_lmdb"), map_size=2**26) as database,
        database.begin(write=True) as transaction,
    ):
        for i, (path, _) in enumerate(image_files(folder)):
            transaction.put(f"{i:040x}".encode(), path.read_bytes())
    shards = packed(tmp_path / "cat_lmdb", tmp_path)
    assert content(shards) == {(pixels, 0) for pixels, _ in wanted}
    assert shards.classes == ("cat_lmdb",)


def test_keeping_originals(folder: Path, tmp_path: Path) -> None:
    config = PackConfig(size=22, keep_original=True)
    pack(Request(str(folder), config), out=tmp_path)
    shards = open_shards(tmp_path)
    assert shards.image_size is None
    originals = {path.read_bytes() for path, _ in image_files(folder)}
    kept = scaled = 0
    for shard in shards.shards:
        for sample in scan_tar(tmp_path / shard.tar):
            with (tmp_path / shard.tar).open("rb") as file:
                file.seek(sample.offset)
                blob = file.read(sample.size)
            image = Image.open(io.BytesIO(blob))
            assert min(image.size) <= 22
            kept += blob in originals
            scaled += blob not in originals and min(image.size) == 22
    assert kept > 5 and scaled > 5 and kept + scaled == IMAGES
    config_random = DataConfig(
        shards=str(tmp_path), image_size=16, crop="random", workers=0, streams=4
    )
    with Stream(shards, config=config_random, seed=0) as stream:
        batch = next(
            stream.batches(images_seen=0, batch_size=30, micro_batch_size=30, rank=0, ranks=1)
        )
    assert batch.images.shape == (30, 3, 16, 16)


def test_info_shows_what_is_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = packed(folder, tmp_path)
    sheet = tmp_path / "sheet.png"
    assert shards_main(["info", shards.root, "--sheet", str(sheet)]) == 0
    text = capsys.readouterr().out
    assert "30 images 16 x 16, 8 shards" in text and "3 classes with 10 to 10 images" in text
    for number, name in enumerate(shards.classes):  # what --classes of trainer.sample takes
        assert f"  {number} {name}: 10\n" in text
    assert Image.open(sheet).size == (6 * 128, 5 * 128)
    assert shards_main(["verify", shards.root, "--full"]) == 0
    assert shards_main(["info", str(tmp_path)]) == REFUSED
    write_tar(tmp_path / "others" / "0.tar", {"a.png": b"no image"})
    assert shards_main(["index", str(tmp_path / "others")]) == 0
    assert shards_main(["info", str(tmp_path / "others"), "--sheet", str(sheet)]) == REFUSED
    assert "/0.tar: a cannot be decoded: no image that" in capsys.readouterr().err
    drawn = sheet.read_bytes()
    for other in ("sheet", "sheet.foo"):
        assert shards_main(["info", shards.root, "--sheet", str(tmp_path / other)]) == REFUSED
        assert f"{other}': must end as a picture does" in capsys.readouterr().err
    with full_disk(100):
        assert shards_main(["info", shards.root, "--sheet", str(sheet)]) == FAILED
    assert f"File too large: '{sheet}'" in capsys.readouterr().err
    assert sheet.read_bytes() == drawn


def test_what_is_no_source_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder, zip"):
        open_source(str(tmp_path / "nothing"), staging=tmp_path)
    assert main([str(tmp_path), str(tmp_path / "out"), "--size", "8"]) == REFUSED


def test_numbered_classes_keep_their_numbers(tmp_path: Path) -> None:
    """Directories named 0 to N - 1, which sorting as text would confuse."""
    for i in range(11):
        path = tmp_path / "train" / str(i) / "x.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(image_file(i, width=20, height=20))
    train = packed(tmp_path / "train", tmp_path)
    assert train.classes == tuple(map(str, range(11)))
    listing = open_source(str(tmp_path / "train"), staging=tmp_path).listing()
    numbers = [int(name.split("/")[0]) for name in listing.names]
    assert numbers == listing.labels


def test_a_validation_set_by_numbers_takes_its_training_sets_names(
    folder: Path, tmp_path: Path
) -> None:
    train = packed(folder, tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        (flat / f"val_{i}.JPEG").write_bytes(image_file(i, width=20, height=20))
    (tmp_path / "val.txt").write_text("".join(f"val_{i}.JPEG {i % 3}\n" for i in range(4)))
    arguments = [str(flat), str(tmp_path / "val"), "--size", "16", "--workers", "1"]
    maps = ["--class-map", str(tmp_path / "val.txt"), "--classes-of", train.root]
    assert main([*arguments, *maps]) == 0
    val = open_shards(tmp_path / "val")
    assert val.classes == train.classes
    assert sorted(label for _, label in content(val)) == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "fine_label": [1]}, r"no column `label`, but \['fine_label'\]"),
        ({"image": [b"x"], "label": [-1]}, "has the label -1"),
        ({"image": [b"x"], "label": [0.5]}, "label = '0.5': must be a class number or a class"),
        ({"image": [b"x"], "label": ["7"]}, "label = '7': must be a class number or a class"),
        ({"image": [b"x"], "label": [[1]]}, r"label = '\[1\]': must be a class number or a class"),
        ({"image": ["a.jpg"], "label": [1]}, "has no column of images"),
        ({"hash": [b"x"], "photo": [b"x"]}, "has several columns of bytes"),
    ],
)
def test_parquet_without_usable_labels_is_refused(
    tmp_path: Path, columns: dict[str, list], message: str
) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "test-00000.parquet")
    with pytest.raises(ValueError, match=message):
        packed(tmp_path, tmp_path / "out")


def test_splits_of_parquet_do_not_mix(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "test")):
        image = image_file(i, width=20, height=20)
        table = pa.table({"image": [image, None], "label": [i, i]})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"holds the splits test, train: give one, such as '.*\*train"
    ):
        packed(tmp_path, tmp_path / "out")
    only = packed(tmp_path / "train-*.parquet", tmp_path / "one")
    assert only.count == 1  # where there was no image, it is listed
    assert "decoded" not in (text := (tmp_path / "one/packed/left-out.txt").read_text()) and text


@pytest.mark.parametrize("part", [0.5, 0.99])  # a page, the footer
def test_damage_in_parquet_names_the_file(folder: Path, tmp_path: Path, part: float) -> None:
    damaged = write_parquet(folder, tmp_path / "parquet") / "train-1.parquet"
    raw = bytearray(damaged.read_bytes())
    at = int(part * len(raw))
    raw[at - 200 : at] = bytes(200)
    damaged.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train-1\.parquet is no readable parquet file: "):
        packed(damaged.parent, tmp_path)


def test_a_damaged_member_of_a_zip_costs_one_image(folder: Path, tmp_path: Path) -> None:
    file = zipped(folder, tmp_path / "all.zip", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(file) as archive:
        offset = archive.infolist()[3].header_offset
    raw = bytearray(file.read_bytes())
    name = int.from_bytes(raw[offset + 26 : offset + 28], "little")
    for at in range(offset + 30 + name, offset + 30 + name + 40):
        raw[at] ^= 255
    file.write_bytes(raw)
    assert packed(file, tmp_path).count == IMAGES - 1


def test_the_image_is_found_behind_other_structs_and_bytes(folder: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path, _ in image_files(folder)][:6]
    columns = {
        "meta": [{"camera": "x"}] * 6,
        "hash": [b"x"] * 6,
        "image": [{"bytes": image, "path": "x"} for image in images],
    }
    (tmp_path / "source").mkdir()
    parquet.write_table(pa.table(columns), tmp_path / "source" / "train.parquet")
    assert packed(tmp_path / "source", tmp_path).count == 6


def test_suffixes_of_any_case_and_names_with_brackets(
    folder: Path, wanted: set[tuple[bytes, int]], tmp_path: Path
) -> None:
    assert content(packed(zipped(folder, tmp_path / "A[1].ZIP"), tmp_path / "1")) == wanted
    tar = write_tars(folder, tmp_path / "tars") / "other-000.tar"
    moved = tar.rename(tmp_path / "b[0].TAR")
    assert packed(moved, tmp_path / "2").count == 13


def test_a_repository_of_parquet_is_told_where_its_images_are(folder: Path, tmp_path: Path) -> None:
    write_parquet(folder, tmp_path / "repo")
    (tmp_path / "repo" / "data").mkdir()
    for file in list((tmp_path / "repo").glob("*.parquet")):
        file.rename(tmp_path / "repo" / "data" / file.name)
    with pytest.raises(
        ValueError, match=r"holds no images; .*give the directory .* \.parquet files"
    ):
        packed(tmp_path / "repo", tmp_path)


def test_an_encrypted_zip_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    file = zipped(folder, tmp_path / "all.zip")
    raw = bytearray(file.read_bytes())
    for mark, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = raw.find(mark)
        while place >= 0:
            raw[place + at] |= 1  # the flag of an encrypted member
            place = raw.find(mark, place + 4)
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"images were left out .*encrypted"):
        packed(file, tmp_path)
