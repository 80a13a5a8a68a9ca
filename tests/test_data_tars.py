"""Tars: ours are what webdataset writes and reads, and those of others are checked strictly."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.dataset import index_directory, verify
from data.tars import scan_tar
from tests.support.data_fixtures import (
    content,
    image_file,
    packed,
    write_folder,
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


def one_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these files, in this order; names may repeat but for a trailing slash."""
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


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
    one_tar(tmp_path / "others.tar", members)
    with pytest.raises(ValueError, match=message):
        packed(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        index_directory(tmp_path)
