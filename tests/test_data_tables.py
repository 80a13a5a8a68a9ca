"""Class maps as tables have them, names of any system, and archives with several of one name."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.support.classes import NAMES, folder, labels, packed, refusal
from tests.support.data_fixtures import image_file

SHUFFLED = (8, *range(8), *range(9, 12))


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{i}.png,{11 - i}.0\n" for i in range(12)),
        "".join(f"{11 - i}.0\n" for i in sorted(range(12), key=str)),
        # Lines and classes are numbers, as the images' names without suffix are.
        ",y,file\n" + "".join(f"{i},{11 - j},{j}.png\n" for i, j in enumerate(SHUFFLED)),
    ],
)  # fmt: skip
def test_numbers_are_classes_by_their_value(tmp_path: Path, text: str) -> None:
    source = folder(tmp_path / "P", tuple(f"{i}.png" for i in range(12)))
    (tmp_path / "map.csv").write_text(text)
    shards = packed(source, "o", class_map=tmp_path / "map.csv")
    assert shards.classes == tuple(map(str, range(12)))
    assert labels(shards) == {f"{i}.png": str(11 - i) for i in range(12)}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("0", "1", "", "1"), "1 images have the class ''"),
        (("0.0", "1.0", "nan", "1.0"), "1 images have the class 'nan'"),
        (("a", "b", "None", "b"), "1 images have the class 'None'"),
        (("0", "1", "-1", "-1"), "2 images have the class -1 beside 0"),
        (('"[0, 1]"', '"[1, 0]"', '"[1, 0]"', '"[0, 1]"'), "'[0, 1]': must be a class number"),
    ],
)
def test_what_stands_for_no_class_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: tuple[str, ...], message: str
) -> None:
    source = folder(tmp_path / "P")
    rows = zip(NAMES, cells, strict=True)
    (tmp_path / "map.csv").write_text("name,label\n" + "".join(f"{n},{c}\n" for n, c in rows))
    assert message in refusal(capsys, source, "--class-map", str(tmp_path / "map.csv"))


def test_two_columns_that_may_be_names_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "P", ("0.png", "1.png", "2.png"))
    for i, text in enumerate(("label,id\n2,0\n0,1\n1,2\n", "n,label,id\n1,0,1\n2,1,2\n3,2,0\n")):
        (tmp_path / "map.csv").write_text(text)
        shards = packed(source, f"o{i}", class_map=tmp_path / "map.csv")
        assert labels(shards) == {"0.png": "2", "1.png": "0", "2.png": "1"}
    (tmp_path / "map.csv").write_text("2,0\n0,1\n1,2\n")
    message = "columns 1 and 2 may both be names of images"
    assert message in refusal(capsys, source, "--class-map", str(tmp_path / "map.csv"))


def test_labels_of_images_that_are_not_there_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "P")
    listed = [[name, 0] for name in (*NAMES, "lost.png", "too.png")]
    (source / "dataset.json").write_text(json.dumps({"labels": listed}))
    packed(source, "o")
    assert "dataset.json: 2 labels are of no image in SOURCE" in capsys.readouterr().err


def test_one_name_in_two_forms_of_unicode_is_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, apart = "caf\u00e9", "cafe\u0301"
    first = packed(folder(tmp_path / "P", (f"{whole}/a.png", "tea/b.png")), "first")
    other = folder(tmp_path / "Q", (f"{apart}/c.png", "tea/d.png"))
    assert packed(other, "second", classes_of=tmp_path / "first").classes == first.classes
    (tmp_path / "map.txt").write_text(f"{whole}/c.png x\ntea/d.png y\n")
    third = packed(other, "third", class_map=tmp_path / "map.txt")
    assert labels(third) == {"c.png": "x", "d.png": "y"}
    lines = ({"file_name": f"{name}.png", "label": name[0]} for name in (f"{apart}/c", "tea/d"))
    (tmp_path / "map.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    fourth = packed(other, "fourth", class_map=tmp_path / "map.jsonl")
    assert labels(fourth) == {"c.png": "c", "d.png": "t"}
    both = folder(tmp_path / "R", (f"{whole}/a.png", f"{apart}/c.png"))
    assert "have the same name in two forms of Unicode" in refusal(capsys, both)


def test_a_zip_with_backslashes_and_replaced_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "P.zip", "w") as archive, pytest.warns(UserWarning):
        for i, name in enumerate(("cat\\a.png", "dog\\a.png", "dog\\b.png", "dog\\b.png")):
            archive.writestr(name, image_file(i, width=16, height=16, kind="PNG"))
    shards = packed(tmp_path / "P.zip", "o")
    assert shards.classes == ("cat", "dog") and shards.count == 3
    assert "1 skipped (replaced in the zip 1)" in capsys.readouterr().err


def test_two_labels_of_one_image_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "P")
    listed = [[name, 0] for name in NAMES]
    for twice, message in (([NAMES[1], 0], ""), ([NAMES[1], 2], "b.png twice, with different")):
        (source / "dataset.json").write_text(json.dumps({"labels": [*listed, twice]}))
        assert (message in refusal(capsys, source)) if message else packed(source, "o")
