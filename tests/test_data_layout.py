"""What users pack in another layout: counted or refused, never mislabelled."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data.dataset import open_shards
from data.pack import main
from tests.support.classes import folder, packed, refusal
from tests.support.data_fixtures import content, image_file, zipped

Form = Callable[[Path], Path]


def class_folders(root: Path, *, classes: tuple[str, ...] = ("n01", "n02")) -> Path:
    return folder(root, tuple(f"{name}/{i}.jpg" for name in classes for i in range(4)))


def tarred(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, path.relative_to(folder), recursive=False)
    return folder.with_suffix(".tar")


def as_it_is(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("form", [as_it_is, zipped])
def test_litter_beside_class_folders_is_no_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Form
) -> None:
    clean = packed(form(class_folders(tmp_path / "clean")))
    source = class_folders(tmp_path / "P")
    folder(source, (".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/n01/._0.jpg", "n01/._1.jpg"))
    for name in (".DS_Store", "Thumbs.db", "n02/Thumbs.db"):
        (source / name).write_bytes(b"x")
    capsys.readouterr()
    shards = packed(form(source))
    text = capsys.readouterr().err
    assert shards.classes == ("n01", "n02") and shards.fingerprint == clean.fingerprint
    assert "8 images in 2 classes (n01, n02), 0 left out, 6 skipped (Thumbs.db 2, " in text
    assert ".ipynb_checkpoints 1" in text


def test_litter_in_a_tar_is_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "P")
    folder(source, ("n01/._0.jpg", "n01/._1.jpg"))
    assert packed(tarred(source)).count == 8
    assert "2 skipped (._* 2)" in capsys.readouterr().err


@pytest.mark.parametrize("form", [as_it_is, zipped])
def test_the_only_top_directory_is_descended(tmp_path: Path, form: Form) -> None:
    clean = packed(form(class_folders(tmp_path / "clean")))
    class_folders(tmp_path / "P" / "archive" / "train")
    for name in ("README.txt", "manifest.json"):  # of another program
        (tmp_path / "P" / "archive" / name).write_text('{"format": "another"}')
    shards = packed(form(tmp_path / "P"))
    assert shards.classes == ("n01", "n02") and content(shards) == content(clean)


def test_one_class_folder_is_one_class(tmp_path: Path) -> None:
    assert packed(folder(tmp_path / "P", ("cat/a.jpg", "cat/more/b.jpg"))).classes == ("cat",)


@pytest.mark.parametrize("form", [as_it_is, zipped])
@pytest.mark.parametrize("inside", ["", "archive/", "archive/train/"])
def test_images_beside_class_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Form, inside: str
) -> None:
    class_folders(tmp_path / "P" / inside)
    folder(tmp_path / "P", (f"{inside}preview.jpg",))
    text = refusal(capsys, form(tmp_path / "P"))
    assert f"1 images, such as {inside}preview.jpg, lie beside the class folders" in text
    assert "--class-map" in text


@pytest.mark.parametrize("form", [as_it_is, zipped])
@pytest.mark.parametrize("inside", ["", "imagenet/"])
def test_splits_are_no_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Form, inside: str
) -> None:
    for split in ("train", "val", "test"):
        class_folders(tmp_path / "P" / f"{inside}{split}")
    text = refusal(capsys, form(tmp_path / "P"))
    assert "holds the splits test, train, val, not classes" in text and "--classes-of" in text
    assert packed(tmp_path / "P" / f"{inside}train").classes == ("n01", "n02")


def test_out_within_source_is_no_class(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "P")
    arguments = [str(source), str(source / "out"), "--size", "16", "--workers", "1"]
    assert main(arguments) == 0
    assert open_shards(source / "out").classes == ("n01", "n02")
    assert main(arguments) == 0


@pytest.mark.parametrize("beside", ["a.png", "n01/a.png", "train/n01/a.png", "sub/more.tar"])
@pytest.mark.parametrize("name", ["left.tar", "left.parquet", "data.mdb"])
def test_images_and_archives_beside_those_of_the_source_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, beside: str
) -> None:
    source = folder(tmp_path / "P", (beside,))
    (source / name).write_bytes(b"")
    assert f"holds {name} and {beside}: move one of them" in refusal(capsys, source)


def test_what_is_no_image_may_lie_beside_tars(tmp_path: Path) -> None:
    """Metadata, notes, litter, and another packed dataset."""
    tar = tarred(class_folders(tmp_path / "Q"))
    (tmp_path / "P").mkdir()
    tar.rename(tmp_path / "P" / "0.tar")
    for name in ("0.parquet", "0.json", ".sheet.png", "notes.mtga"):
        (tmp_path / "P" / name).write_bytes(b"")
    packed(tmp_path / "Q")
    (tmp_path / "oQ").rename(tmp_path / "P" / "packed")
    assert packed(tmp_path / "P").count == 8


def test_a_class_folder_without_images_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = class_folders(tmp_path / "P")
    (source / "n03").mkdir()
    assert "no image in the class folders n03" in refusal(capsys, source)
    (source / "n03" / "notes.txt").write_text("x")
    assert "no image in the class folders n03" in refusal(capsys, zipped(source))


@pytest.mark.parametrize("form", [as_it_is, zipped, tarred])
def test_what_pillow_opens_is_packed_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Form
) -> None:
    source = class_folders(tmp_path / "P")
    for i, suffix in enumerate(("gif", "tif", "tiff", "jfif", "avif", "pgm", "tga", "jp2")):
        picture = Image.open(io.BytesIO(image_file(i, width=20, height=20)))
        kind = {"jfif": "jpeg"}.get(suffix)
        picture.convert("L" if suffix == "pgm" else "RGB").save(
            source / "n02" / f"other {i}.{suffix}", format=kind
        )
    for name in ("n01/a.txt", "n01/b.txt", "c.TXT", "n02/d.mat", "n02/LICENSE", "n02/e.mtga"):
        (source / name).write_text("two words")
    assert packed(form(source)).count == 16
    text = capsys.readouterr().err
    assert "16 images in 2 classes (n01, n02), 0 left out, 6 skipped" in text
    assert "(.txt 3, .mat 1, .mtga 1, without a suffix 1)" in text


def test_a_folder_of_unknown_files_is_refused_with_their_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "P").mkdir()
    for i in range(3):
        (tmp_path / "P" / f"{i}.heic").write_bytes(b"x")
    assert "holds no images; 3 skipped (.heic 3)" in refusal(capsys, tmp_path / "P")


@pytest.mark.parametrize("form", [zipped, tarred])
def test_an_archive_of_archives_is_to_be_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Form
) -> None:
    """As ILSVRC2012_img_train.tar, which holds a tar of each class."""
    folder(tmp_path / "P", ("n01.tar", "n02.tar"))
    text = "2 skipped (.tar 2): unpack it, and give the directory or pattern of the .tar files in"
    assert text in refusal(capsys, form(tmp_path / "P"))


def test_a_mask_beside_a_photo_in_a_tar_stays_a_mask(tmp_path: Path) -> None:
    source = folder(tmp_path / "P", ("a.jpg", "a.gif", "b.jpg", "b.seg.tif"))
    assert packed(tarred(source)).count == 2


def test_years_are_names_of_classes(tmp_path: Path) -> None:
    shards = packed(class_folders(tmp_path / "P", classes=("2020", "2019", "999")))
    assert shards.classes == ("999", "2019", "2020")
    assert {label for _, label in content(shards)} == {0, 1, 2}


@pytest.mark.parametrize("names", [("1", "2", "10"), ("01", "02", "10")])
def test_numbers_from_one_are_names_of_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert packed(class_folders(tmp_path / "P", classes=names)).classes == names


def test_one_number_spelled_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = class_folders(tmp_path / "P", classes=("1", "01", "2"))
    assert "the class folders 01 and 1 are the same number" in refusal(capsys, source)


@pytest.mark.parametrize(
    ("train", "val", "labels"),
    [
        (("2019", "2020", "2021"), ("2021", "2020"), {1, 2}),
        (("1", "2", "3"), ("3",), {2}),
        (("1", "2", "3"), ("01", "02"), {0, 1}),
        (("0", "1", "2"), ("2", "0"), {0, 2}),
        (("a", "b", "c"), ("0", "2"), {0, 2}),
        (("a", "b", "c"), ("c",), {2}),
        (("a", "b", "c"), ("d",), None),
        (("1", "2", "3"), ("0", "1"), None),
        (("2019", "2020"), ("2018",), None),
    ],
)
def test_a_split_of_numbered_folders_takes_the_training_sets_labels(
    tmp_path: Path, train: tuple[str, ...], val: tuple[str, ...], labels: set[int] | None
) -> None:
    of = packed(class_folders(tmp_path / "train", classes=train))
    source = class_folders(tmp_path / "val", classes=val)
    if labels is None:
        with pytest.raises(ValueError, match="--classes-of has no class"):
            packed(source, classes_of=of.root)
        return
    shards = packed(source, classes_of=of.root)
    assert shards.classes == of.classes
    assert {label for _, label in content(shards)} == labels


def test_a_class_map_of_years_takes_the_training_sets_labels(tmp_path: Path) -> None:
    of = packed(class_folders(tmp_path / "train", classes=("2019", "2020")))
    source = folder(tmp_path / "val", ("a.jpg", "b.jpg"))
    (tmp_path / "map").write_text("a.jpg 2020\nb.jpg 2019\n")
    shards = packed(source, classes_of=of.root, class_map=tmp_path / "map")
    assert {label for _, label in content(shards)} == {0, 1}


def test_a_class_map_takes_the_place_of_any_layout(tmp_path: Path) -> None:
    source = folder(tmp_path / "P", ("train/a.jpg", "val/b.jpg", "c.jpg"))
    (tmp_path / "map").write_text("a.jpg cat\nb.jpg dog\nc.jpg cat\n")
    assert packed(source, class_map=tmp_path / "map").classes == ("cat", "dog")
