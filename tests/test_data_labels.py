"""Labels in the many ways in which others store them: read as they are meant, or refused."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.dataset import Shards
from data.pack import pack
from data.packing.begun import Request
from data.packing.indexing import index_directory
from data.packing.plan import PackConfig
from tests.support.data_fixtures import content, image_file, packed, write_tar


def picture(seed: int) -> bytes:
    return image_file(seed, width=20, height=20)


def labelled_tar(root: Path, *labels: bytes, suffix: str) -> Path:
    members = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.jpg": picture(i), f"{i}.{suffix}": label}
    return write_tar(root / "tars" / "0.tar", members).parent


def labels_of(shards: Shards) -> list[int]:
    return sorted(label for _, label in content(shards))


@pytest.mark.parametrize(
    ("suffix", "stored"),
    [
        ("json", [b'{"class_id": 0}', b'{"class_id": 2}']),
        ("json", [b'{"label": 0.0}', b'{"label": 2.0}']),
        ("json", [b"0.0", b"2"]),
        ("txt", [b"0", b"2"]),
    ],
)
def test_numbers_in_tars_are_labels(tmp_path: Path, suffix: str, stored: list[bytes]) -> None:
    tars = labelled_tar(tmp_path, *stored, suffix=suffix)
    assert labels_of(packed(tars, tmp_path)) == [0, 2]
    assert index_directory(tars).classes == ("0", "1", "2")


def test_classes_without_an_image_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers may count from 1: class 0 would be drawn, and never trained."""
    for name in ("some", "all", "validation"):
        (tmp_path / name).mkdir()
    some = labelled_tar(tmp_path / "some", b"1", b"2", b"4", suffix="cls")
    classes = packed(some, tmp_path / "some").root
    index_directory(some)
    assert capsys.readouterr().err.count("2 of 5 classes have no image (0, 3)") == 2
    packed(labelled_tar(tmp_path / "all", b"1", b"0", suffix="cls"), tmp_path / "all")
    few = labelled_tar(tmp_path / "validation", b"1", suffix="cls")
    request = Request(str(few), PackConfig(size=16), classes_of=classes)
    pack(request, out=tmp_path / "validation" / "packed")
    assert "no image" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "stored"),
    [
        ("json", [b'{"label": "dog"}', b'{"label": "cat"}']),
        ("json", [b'{"class": "dog"}', b'{"class": "cat"}']),
        ("cls", [b"dog\n", b"cat\n"]),
        ("txt", [b"dog", b"cat\n"]),
    ],
)
def test_names_in_tars_are_labels(tmp_path: Path, suffix: str, stored: list[bytes]) -> None:
    tars = labelled_tar(tmp_path, *stored, suffix=suffix)
    shards = packed(tars, tmp_path)
    assert shards.classes == ("cat", "dog") and labels_of(shards) == [0, 1]
    with pytest.raises(ValueError, match="has the label 'dog': must be a class number"):
        index_directory(tars)


def test_labels_that_are_kept_back_are_counted(tmp_path: Path) -> None:
    """As in the test split of a challenge: each is -1."""
    tars = labelled_tar(tmp_path, b"-1", b"0", b"-1", suffix="cls")
    with pytest.raises(ValueError, match=r"0\.jpg has the label -1: .* 2 of 3 .* --class-map"):
        packed(tars, tmp_path)


def test_a_date_is_the_name_of_a_class(tmp_path: Path) -> None:
    tars = labelled_tar(tmp_path, b"2020_01", b"2019_05", suffix="cls")
    assert packed(tars, tmp_path).classes == ("2019_05", "2020_01")


@pytest.mark.parametrize(
    ("suffix", "stored", "message"),
    [
        ("json", b'{"label": "3"}', r"0\.json: label = '3': must be a class number or"),
        ("json", b'{"label": 1.5}', r"0\.json: label = '1\.5': must be"),
        ("json", b'{"class_id": [1, 2]}', r"0\.json: class_id = '\[1, 2\]': must be"),
        ("json", b'{"label": true}', r"0\.json: label = 'True': must be"),
        ("cls", b"1.5", r"0\.cls = b'1\.5': must be"),
        ("cls", b"", r"0\.cls = b'': must be"),
        ("cls", b"\xff\xd8", r"0\.cls = .*: must be"),
        ("cls", b"[0, 1]", r"0\.jpg has the label '\[0, 1\]': must be"),
        ("cls", b"NaN", r"0\.jpg has the label 'NaN': must be"),
        ("txt", b"None", r"0\.jpg has the label 'None': must be"),
        ("json", b'{"label": "nan"}', r"0\.jpg has the label 'nan': must be"),
        ("cls", b"-1", r"0\.jpg has the label -1: must be"),
        ("cls", b"3000000000", r"0\.jpg has the label 3000000000: must be the number of a class"),
        ("json", b"20000000", r"0\.jpg has the label 20000000: must be the number of a class"),
    ],
)
def test_a_label_that_is_no_number_or_name_is_refused(
    tmp_path: Path, suffix: str, stored: bytes, message: str
) -> None:
    tars = labelled_tar(tmp_path, stored, suffix=suffix)
    with pytest.raises(ValueError, match=message):
        packed(tars, tmp_path)
    with pytest.raises(ValueError, match=message):
        index_directory(tars)


def test_numbers_and_names_do_not_mix(tmp_path: Path) -> None:
    tars = labelled_tar(tmp_path, b"1", b"dog", suffix="cls")
    with pytest.raises(ValueError, match=r"1\.jpg and 0 others have the name of a class"):
        packed(tars, tmp_path)


def test_captions_in_txt_are_no_labels(tmp_path: Path) -> None:
    tars = labelled_tar(tmp_path, b"dog", b"a cat on a mat", suffix="txt")
    assert packed(tars, tmp_path).classes == ("",)


@pytest.mark.parametrize("column", ["label", "class", "class_id"])
@pytest.mark.parametrize("values", [[0, 2], [0.0, 2.0], ["a", "c"]])
def test_columns_of_numbers_or_names_are_labels(
    tmp_path: Path, column: str, values: list[object]
) -> None:
    table = pa.table({"image": [picture(0), picture(1)], column: values})
    parquet.write_table(table, tmp_path / "a.parquet")
    shards = packed(tmp_path / "a.parquet", tmp_path)
    are_names = values == ["a", "c"]
    assert shards.classes == (("a", "c") if are_names else ("0", "1", "2"))
    assert labels_of(shards) == ([0, 1] if are_names else [0, 2])


def hugging_face(file: Path, *, labels: tuple[int, ...], metadata: str) -> None:
    """A parquet file with that metadata; NAMES is its list of features."""
    file.parent.mkdir(exist_ok=True)
    images = [{"bytes": picture(label), "path": ""} for label in labels]
    table = pa.table({"image": images, "label": labels})
    parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), file)


def names(*of: object) -> str:
    return json.dumps({"info": {"features": {"label": {"names": of}}}})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (names("cat", "dog"), names("dog", "cat"), "has the class names dog, cat, .* cat, dog: "),
        (names("cat", "dog"), "{}", r"b\.parquet has the class names \(none\), .* cat, dog: "),
        (names("cat"), names("cat"), "has the label 1: must be below 1, which is all class names"),
        (names("cat", 7), "{}", r"a\.parquet: names = \['cat', 7\] in its metadata: must be"),
        ("torn", "{}", r"a\.parquet: its metadata `huggingface` is damaged"),
        ('{"info": null}', '{"info": {"features": "label"}}', ""),
        (names("cat", "dog", "ant"), names("cat", "dog", "ant"), ""),
    ],
)
def test_class_names_of_parquet_fit_all_labels_of_all_files(
    tmp_path: Path, first: str, second: str, message: str
) -> None:
    for name, metadata in (("a", first), ("b", second)):
        hugging_face(tmp_path / "P" / f"{name}.parquet", labels=(0, 1), metadata=metadata)
    if not message:
        assert labels_of(packed(tmp_path / "P", tmp_path)) == [0, 1]
        return
    of = packed(labelled_tar(tmp_path, b"cat", b"dog", suffix="cls"), tmp_path)
    for classes_of in (None, Path(of.root)):
        with pytest.raises(ValueError, match=message):
            pack(
                Request(str(tmp_path / "P"), PackConfig(size=16), classes_of=classes_of),
                out=tmp_path / "out",
            )


@pytest.mark.parametrize(
    "suffix",
    ["jpg.json", "info.json", "JSON", "jpg.cls", "CLS", "label", "output.class", "outputs.txt"],
)
def test_labels_beside_the_image_under_longer_names_are_read(tmp_path: Path, suffix: str) -> None:
    is_json, members = suffix.lower().endswith("json"), {}
    for i in range(6):
        label = json.dumps({"label": i % 3}) if is_json else str(i % 3)
        members |= {f"{i}.jpg": picture(i), f"{i}.{suffix}": label.encode()}
    write_tar(tmp_path / "tars" / "a.tar", members)
    assert packed(tmp_path / "tars", tmp_path).classes == ("0", "1", "2")
