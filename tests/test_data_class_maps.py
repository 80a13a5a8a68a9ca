"""Classes from files as people have them, from prefixes of names, and from `dataset.json`."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.support.classes import NAMES, folder, labels, packed, refusal
from tests.support.data_fixtures import image_file, write_tar, zipped

CLASSES = ("cat", "dog", "dog", "cat")
WANTED = dict(zip(NAMES, CLASSES, strict=True))
PAIRS = list(WANTED.items())


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{name} {label}\n" for name, label in PAIRS),
        "".join(f"{label}\t{name}\n" for name, label in PAIRS),
        "\ufefffilename,label\r\n" + "".join(f"{name},{label}\r\n" for name, label in PAIRS),
        "# made by hand\n\n" + "".join(f'"{name}" , "{label}"\n' for name, label in PAIRS),
        ",file,label\n" + "".join(f"{i},{n},{c}\n" for i, (n, c) in enumerate(PAIRS)),
        "".join(f"{i};{c};{n}\n" for i, (n, c) in enumerate(PAIRS, start=1)),
        "id,breed,class\n" + "".join(f"{n[:-4]},x{n},{c}\n" for n, c in PAIRS),
        "".join(f"./images/{n},{c}\n" for n, c in PAIRS),
        "ImageId,PredictionString\n"
        + "".join(f"{n[:-4]},{c} 1 2 3 4 {c} 5 6 7 8\n" for n, c in PAIRS),
        "".join(f"{c}\n" for c in CLASSES),
        "label\n" + "".join(f"{c}\n" for c in CLASSES),
        "".join(
            json.dumps({"file_name": n, "text": f"a {c}, 1", "label": c}) + "\n" for n, c in PAIRS
        ),
    ],
)
def test_a_class_map_is_understood(tmp_path: Path, text: str) -> None:
    inside = "images/" if "images/" in text else ""
    source = folder(tmp_path / "P", tuple(f"{inside}{name}" for name in NAMES))
    (tmp_path / "map.csv").write_text(text)
    shards = packed(source, class_map=tmp_path / "map.csv")
    assert shards.classes == ("cat", "dog") and labels(shards) == WANTED


@pytest.mark.parametrize("above", ["P/", "{root}/P/", "{name}/P/"])
@pytest.mark.parametrize("mark", [",", " "])
def test_names_may_begin_above_the_source(tmp_path: Path, above: str, mark: str) -> None:
    source = folder(tmp_path / "P", tuple(f"images/{name}" for name in NAMES))
    above = above.format(root=tmp_path, name=tmp_path.name)
    rows = [f"{above}images/{name}{mark}{label}\n" for name, label in PAIRS]
    (tmp_path / "map").write_text("".join(rows))
    assert labels(packed(source, class_map=tmp_path / "map")) == WANTED


def test_names_and_classes_may_have_spaces(tmp_path: Path) -> None:
    source = folder(tmp_path / "P", ("my photo.png", "b.png"))
    (tmp_path / "map").write_text("my photo.png cat\nb.png great white shark\n")
    shards = packed(source, class_map=tmp_path / "map")
    assert labels(shards) == {"my_photo.png": "cat", "b.png": "great white shark"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.png cat\nb.png dog\n", "has no class for c.png; add its line"),
        ("a.png cat\n" * 2 + "b.png dog\nc.png dog\nd.png cat\n", "has a.png twice"),
        ("x.png cat\ny.png dog\n", "has no column of names of images, such as a.png"),
        ("a.png,1,2\nb.png,1,3\nc.png,4,4\nd.png,2,2\n", "one of 2 columns beside the names"),
        ("a.png,n1 1 2 3 4 n2 1 2 3 4\nb.png,n1\nc.png,n1\nd.png,n1\n", "boxes of several classes"),
        *(
            ("".join(f"{n}{mark}{c}\n" for n, c in PAIRS), f"'a.png{mark}cat' begins with the name")
            for mark in (":", "|", "=")
        ),
        ("a:cat\nb:dog\nc:dog\nd:cat\n", "'a:cat' begins with the name of an image"),
        ("".join(f"{n}\n" for n in NAMES), "'a.png' begins with the name of an image"),
        ("cat\ndog\n", "has 2 labels for 4 images"),
        (
            "".join(f'{{"file_name": "{n}", "label": null}}\n' for n in NAMES[:1])
            + "".join(f'{{"file_name": "{n}", "label": 0}}\n' for n in NAMES[1:]),
            "1 images have the class ''",
        ),
        ('"a.png cat\n' + "x" * 2**17, "is no text of names and classes: field larger than"),
        ("a.png,cat\nb.png,dog,x\nc.png,dog\nd.png,cat\n", "'b.png dog x': must be NAME CLASS"),
    ],
)
def test_a_class_map_that_leaves_a_doubt_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source = folder(tmp_path / "P")
    (tmp_path / "map").write_text(text)
    assert message in refusal(capsys, source, "--class-map", str(tmp_path / "map"))


def test_one_name_of_two_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "P", ("x/a.png", "y/a.png"))
    (tmp_path / "map").write_text("a.png cat\n")
    text = refusal(capsys, source, "--class-map", str(tmp_path / "map"))
    assert "a.png is the name of 2 images" in text
    (tmp_path / "map").write_text("x/a.png cat\ny/a.png dog\n")
    assert packed(source, class_map=tmp_path / "map").classes == ("cat", "dog")


@pytest.mark.parametrize("numbers", [("2019", "2020"), ("1", "2")])
def test_years_and_numbers_from_one_in_a_map_are_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: tuple[str, str]
) -> None:
    source = folder(tmp_path / "P")
    lines = [f"{name} {numbers[label == 'dog']}\n" for name, label in PAIRS]
    (tmp_path / "map").write_text("".join(lines))
    assert packed(source, class_map=tmp_path / "map").classes == numbers
    names = packed(folder(tmp_path / "N", ("x/a.png", "y/b.png")))  # two classes, by name
    options = ("--class-map", str(tmp_path / "map"), "--classes-of", names.root)
    said = refusal(capsys, source, *options)  # 2 is one too many
    assert "has no class" in said and ("as ImageNet's own do" in said) == (numbers == ("1", "2"))


@pytest.mark.parametrize("form", ["flat", "nested", "zip", "tar"])
def test_prefixes_are_classes_as_in_the_reference(tmp_path: Path, form: str) -> None:
    names = tuple(f"{c}_{i}.png" for i, c in enumerate(CLASSES))
    inside = "some/where/" if form == "nested" else ""
    source = folder(tmp_path / "P", tuple(inside + name for name in names))
    if form == "zip":
        source = zipped(source)
    if form == "tar":
        with tarfile.open(tmp_path / "P.tar", "w") as tar:
            for name in names:
                tar.add(source / name, name)
        source = tmp_path / "P.tar"
    shards = packed(source, class_from="prefix")
    assert labels(shards) == dict(zip(names, CLASSES, strict=True))


def test_a_name_without_a_prefix_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "P", ("cat_0.png", "plain.png"))
    text = refusal(capsys, source, "--class-from", "prefix")
    assert "plain.png has no class before a `_`" in text
    assert "no names of files" in refusal(capsys, Path("digits"), "--class-from", "prefix")


def test_a_flat_folder_says_that_it_has_no_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = packed(folder(tmp_path / "N", ("x/a.png", "y/b.png")))
    source = folder(tmp_path / "P")
    assert packed(source).classes == ("",)
    text = capsys.readouterr().err
    assert "4 of 4 images have no label" in text and "--class-map or --class-from" in text
    for unlabelled in (source, tmp_path / "oP"):  # the folder, and what it was packed to
        text = refusal(capsys, unlabelled, "--classes-of", train.root)
        assert "some images have no label; add --class-map" in text


def test_a_dataset_packed_again_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    first = packed(folder(tmp_path / "P", ("zebra/a.png", "cat/b.png", "7/c.png")))
    assert packed(Path(first.root)).classes == first.classes == ("7", "cat", "zebra")
    (Path(first.root) / "manifest.json").write_text('{"name": "of another program"}')
    (tmp_path / "ooP").rename(tmp_path / "before")
    assert packed(Path(first.root)).classes == ("0", "1", "2")


def test_directories_in_a_tar_may_be_preferred_to_its_labels(tmp_path: Path) -> None:
    members = {}
    for i, name in enumerate(NAMES):
        image = image_file(i, width=16, height=16, kind="PNG")
        members |= {f"{CLASSES[i]}/{name[0]}.png": image, f"{CLASSES[i]}/{name[0]}.cls": b"7"}
    write_tar(tmp_path / "P.tar", members)
    shards = packed(tmp_path / "P.tar", class_from="directory")
    assert labels(shards) == WANTED


STYLEGAN = ("00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_labels_of_stylegan_are_read(tmp_path: Path, form: str) -> None:
    source = folder(tmp_path / "P", STYLEGAN)
    text = json.dumps({"labels": [[name, (2, 0, 1)[i]] for i, name in enumerate(STYLEGAN)]})
    (source / "dataset.json").write_text(text)
    if form == "zip":
        source = zipped(source)
    shards = packed(source)
    assert shards.classes == ("0", "1", "2")
    names = [Path(name).name for name in STYLEGAN]
    assert labels(shards) == dict(zip(names, ("2", "0", "1"), strict=True))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"labels": [["00000/img00000000.png", 1]]}, "has no label for 00000/img00000001.png"),
        ({"labels": [[name, [0.1, 2]] for name in STYLEGAN]}, "= [0.1, 2]: must be a number"),
        ({"labels": 3}, "labels must be a list"),
    ],
)
def test_labels_of_stylegan_that_are_no_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: object, message: str
) -> None:
    source = folder(tmp_path / "P", STYLEGAN)
    (source / "dataset.json").write_text(json.dumps(found))
    assert message in refusal(capsys, source)


def test_a_set_of_stylegan_without_labels_has_no_classes(tmp_path: Path) -> None:
    source = folder(tmp_path / "P", STYLEGAN)
    (source / "dataset.json").write_text('{"labels": null}')
    assert packed(source).classes == ("",)
