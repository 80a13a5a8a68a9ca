"""Tars: ours are what webdataset writes and reads, and those of others are checked strictly."""

import errno
import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.dataset import Shards, open_shards, verify
from data.exits import REFUSED, TO_BE_CONTINUED
from data.order import Order
from data.packing.indexing import index_directory
from data.packing.tars import scan_tar
from data.shards import main as shards_main
from tests.support.data_fixtures import (
    content,
    image_file,
    packed,
    write_folder,
    write_tar,
    write_tars,
)

IMAGES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sources") / "folder", images=IMAGES)


def test_plain_webdataset_reads_our_shards(folder: Path, tmp_path: Path) -> None:
    shards = packed(folder, tmp_path)
    urls = [str(Path(shards.root) / shard.tar) for shard in shards.shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    read = {(image.transpose(2, 0, 1).tobytes(), label) for image, label in dataset}
    assert read == content(shards) and len(read) == IMAGES


def test_the_tar_is_what_webdataset_would_write(folder: Path, tmp_path: Path) -> None:
    shards = packed(folder, tmp_path)
    for shard in shards.shards:
        ours = (Path(shards.root) / shard.tar).read_bytes()
        buffer = io.BytesIO()
        with wds.TarWriter(buffer, mtime=0, encoder=False) as writer:
            for sample in wds.WebDataset([str(Path(shards.root) / shard.tar)], shardshuffle=False):
                writer.write({k: v for k, v in sample.items() if k in ("__key__", "cls", "png")})
        assert buffer.getvalue() == ours


@pytest.mark.parametrize("json_labels", [False, True])
def test_tars_by_others_can_be_indexed_where_they_are(
    folder: Path, tmp_path: Path, json_labels: bool
) -> None:
    tars = write_tars(folder, tmp_path / "tars", json_labels=json_labels)
    shards = index_directory(tars)
    assert shards.count == IMAGES and shards.image_size is None
    # Runs on them resume after they were indexed again.
    assert shards.made_by == {"index": "tars made by others"}
    assert verify(tars, full=True) == []
    labels = np.concatenate([shards.index(i)["label"] for i in range(len(shards.shards))])
    assert np.bincount(labels).tolist() == [10, 10, 10]
    assert len(content(shards)) == IMAGES
    with pytest.raises(ValueError, match="has a manifest already"):
        index_directory(tars)


def test_a_tar_that_others_end_silently_is_an_error(folder: Path, tmp_path: Path) -> None:
    tar = write_tars(folder, tmp_path / "tars") / "other-000.tar"
    whole = tar.read_bytes()
    header = scan_tar(tar)[5].offset - 512
    damaged = bytearray(whole)
    damaged[header + 3] ^= 4
    for content_ in (bytes(damaged), whole[: header + 700]):
        tar.write_bytes(content_)
        with pytest.raises(ValueError, match=r"other-000\.tar"):
            scan_tar(tar)


def test_tars_joined_by_cat_are_an_error(folder: Path, tmp_path: Path) -> None:
    first, second = sorted(write_tars(folder, tmp_path / "tars").glob("*.tar"))[:2]
    first.write_bytes(first.read_bytes() + second.read_bytes())
    for read in (lambda: packed(first.parent, tmp_path), lambda: index_directory(first.parent)):
        with pytest.raises(ValueError, match=r"other-000\.tar ends at byte \d+, and another tar"):
            read()


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_tar_with_holes_is_an_error(tmp_path: Path, form: str) -> None:
    with (tmp_path / "a.bmp").open("wb") as file:
        file.seek(2**20)
        file.write(b"x")
    (tmp_path / "b.jpg").write_bytes(image_file(0, width=20, height=20))
    command = ["tar", "--sparse", f"--format={form}", "-cf", "a.tar", "a.bmp", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"a\.tar: a\.bmp is stored with holes"):
        scan_tar(tmp_path / "a.tar")


def test_links_in_a_tar_are_second_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    with tarfile.open(tmp_path / "a" / "linked.tar", "w") as tar:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.REGTYPE, tarfile.LNKTYPE)):
            info = tarfile.TarInfo(f"n{i}/{i}.jpg")
            info.type = kind
            info.linkname = {0: "../n1/1.jpg", 2: "n1/1.jpg"}.get(i, "")
            picture = image_file(1, width=20, height=20)
            info.size = len(picture) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(picture))
        for name, target in (("n0/loop.jpg", "loop.jpg"), ("n0/out.jpg", "/etc/hostname")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    shards = packed(tmp_path / "a", tmp_path)
    assert shards.classes == ("n0", "n1", "n2")
    assert sorted(label for _, label in content(shards)) == [0, 1, 2]
    assert "2 skipped (links to no file of the tar 2)" in capsys.readouterr().err


def class_tars(root: Path, *, names: tuple[str, ...], member: str) -> Path:
    root.mkdir()
    for i, name in enumerate(names):
        pictures = {
            member.format(name=name, i=j): image_file(9 * i + j, width=20, height=20)
            for j in range(3)
        }
        write_tar(root / f"{name}.tar", pictures)
    return root


@pytest.mark.parametrize(
    ("names", "member", "classes"),
    [
        (("n01440764", "n01443537"), "{name}_{i}.JPEG", ("n01440764", "n01443537")),
        (("cat", "dog"), "{i}.jpg", ("cat", "dog")),
        (("00000", "00001"), "{name}000{i}.jpg", ("",)),  # of img2dataset
        (("cats-000", "cats-001"), "{i}.jpg", ("",)),
        (("000", "001"), "{i}.jpg", ("",)),
        (("s-0", "s-1"), "ant/{i}{name}.jpg", ("",)),
        (("n01", "n02"), "./{name}/{name}_{i}.JPEG", ("n01", "n02")),
        (("00000", "00001"), "{name}/{i}.jpg", ("",)),
    ],
)
def test_tars_and_directories_in_them_are_classes_unless_they_are_shards(
    tmp_path: Path, names: tuple[str, ...], member: str, classes: tuple[str, ...]
) -> None:
    source = class_tars(tmp_path / "tars", names=names, member=member)
    shards = packed(source, tmp_path)
    assert shards.classes == classes
    assert index_directory(source).classes == classes


def test_indexing_takes_directories_as_classes_and_leaves_the_tars_alone(
    folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    with tarfile.open(source / "all.tar", "w") as tar:
        tar.add(folder, ".")
    before = [path.name for path in source.iterdir()]
    shards = index_directory(source, out=tmp_path / "out")
    assert [path.name for path in source.iterdir()] == before
    assert shards.classes == ("n0000", "n0001", "n0002")
    assert content(shards) == content(packed(folder, tmp_path))
    assert verify(tmp_path / "out", full=True) == []


def test_tars_without_an_image_are_not_indexed_and_such_shards_are_not_trained_on(
    folder: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(__file__, "a.txt")
    with pytest.raises(ValueError, match=r"no image in 1 tars: .* end with \.jpg, \.jpeg"):
        index_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.tar"]
    for shards in ([], [0, 0]):
        with pytest.raises(ValueError, match="the shards hold none"):
            Order(shards, seed=0, streams=0, block=1)


def test_merged_datasets_are_one(folder: Path, tmp_path: Path) -> None:
    first = packed(folder, tmp_path / "a")
    write_folder(tmp_path / "more", images=9)
    for path in (tmp_path / "more").rglob("*.JPEG"):
        path.write_bytes(image_file(len(path.name), width=20, height=20, kind="PNG"))
    second = packed(tmp_path / "more", tmp_path / "b")
    out = tmp_path / "both"
    assert shards_main(["merge", str(out), first.root, second.root]) == 0
    both = open_shards(out)
    assert content(both) == content(first) | content(second)
    assert both.count == first.count + second.count and verify(out, full=True) == []
    assert shards_main(["merge", str(out), first.root, second.root]) == REFUSED
    assert shards_main(["merge", str(tmp_path / "c"), first.root, first.root]) == REFUSED
    (tmp_path / "more" / "n0001").rename(tmp_path / "more" / "n0009")
    other = packed(tmp_path / "more", tmp_path / "d")
    assert shards_main(["merge", str(tmp_path / "c"), first.root, other.root]) == REFUSED
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["index", "merge"])
def test_an_interrupted_command_can_be_run_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    link, out = os.link, tmp_path / "out"

    def interrupted(file: Path, to: Path) -> None:
        link(file, to)
        signal.raise_signal(signal.SIGTERM)

    arguments = [command, str(out), packed(folder, tmp_path).root]
    if command == "index":
        arguments = [command, str(write_tars(folder, tmp_path / "tars")), "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", interrupted)
        assert shards_main(arguments) == TO_BE_CONTINUED
    assert shards_main(arguments) == 0 and open_shards(out).count == IMAGES


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_file_system_without_links_is_named(
    whole: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As exFAT and mounted object stores are, and FAT."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(ValueError, match=rf"^OUT = {tmp_path}/out is on a .* without links \("):
        index_directory(Path(whole.root), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.jpg/"], "has a.jpg twice"),
        (["2021.01.00.jpg", "2021.01.01.jpg"], "2021.01.00.jpg and 2021.01.01.jpg in one sample"),
        (["a.jpg", "a.cls", "b.jpg"], "b.jpg has no label, nor have 0 others"),
        (["a.jpg", "a.json"], "a.json = .*: must be a class number"),
    ],
)
def test_tars_that_would_lose_images_or_labels_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    picture = image_file(0, width=20, height=20)
    members = {name: b"1" if name.endswith("cls") else picture for name in names}
    write_tar(tmp_path / "others.tar", members)
    with pytest.raises(ValueError, match=message):
        packed(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        index_directory(tmp_path)
