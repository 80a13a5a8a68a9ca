"""Damaged shards and images: the run stops, or one image is replaced and counted."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data import shards as commands
from data.config import FetchConfig
from data.dataset import Shards, open_shards, verify
from data.npz import npy
from data.stored_images import StoredImages
from data.stream import Stream, data_remarks, to_device
from data.transforms import flips
from tests.support.data_fixtures import image_file, pack_folder, write_shards
from tests.support.data_streams import IMAGES, SIZE, config_for, fails, take


def rewrite(shards: Shards, shard: int, *, at: int, flip: int) -> None:
    path = Path(shards.root) / shards.shards[shard].tar
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_stops_the_run(copy: Shards, workers: int) -> None:
    path = Path(copy.root) / "00002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    named = (
        r"00002\.tar: reading stopped at byte \d+ .*bytes early; while reading (image|\d{8}-img)"
    )
    fails(copy, OSError, named, workers=workers)


def test_a_tar_cut_inside_an_image_names_it(copy: Shards) -> None:
    path = Path(copy.root) / "00002.tar"
    entry = copy.index(2)[3]
    with path.open("rb") as tar:
        tar.seek(int(entry["offset"]) - 512)
        key = tar.read(100).partition(b".")[0].decode()
    os.truncate(path, int(entry["offset"]) + 20)
    stored = StoredImages(copy, config=FetchConfig(retries=0))
    with pytest.raises(OSError, match=rf"00002\.tar: .* while reading {key}, at byte"):
        stored.read(2, 3)


def test_a_flipped_header_bit_stops_the_run(copy: Shards) -> None:
    header = int(copy.index(3)[2]["offset"]) - 512
    rewrite(copy, 3, at=header + 5, flip=1)
    fails(copy, ValueError, rf"00003\.tar: no tar header of \d{{8}}-img_\d+ at byte {header}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_payload_byte_costs_one_image(copy: Shards, workers: int) -> None:
    entry = copy.index(3)[2]
    rewrite(copy, 3, at=int(entry["offset"]) + int(entry["size"]) // 2, flip=255)
    check_one_replaced(copy, r"00003.tar: ", "has another checksum than the index", workers=workers)


def check_one_replaced(shards: Shards, *needles: str, workers: int = 0) -> None:
    """Exactly the one bad sample is replaced, counted and named, epoch after epoch.

    The other image comes with its own label, mirrored as the one would have been.
    """
    lines: list[str] = []
    config = config_for(shards.root, workers=workers)
    with Stream(shards, config=config, seed=1) as stream:
        stream.log = lines.append
        batches = take(stream)
        assert stream.bad == len(lines) == 2
    assert all(needle in line for needle in needles for line in lines)
    mirrored = flips(seed=1, indices=np.arange(2 * IMAGES))
    for e in range(2):
        epoch = batches[5 * e : 5 * e + 5]
        upright = [
            (image.flip(-1) if mirrored[index] else image).numpy().tobytes()
            for batch in epoch
            for image, index in zip(batch.images, batch.indices, strict=True)
        ]
        labels = [label for batch in epoch for label in batch.labels.tolist()]
        assert len(upright) == IMAGES and len(set(upright)) == IMAGES - 1
        assert len(set(zip(upright, labels, strict=True))) == IMAGES - 1


def test_an_undecodable_image_costs_one_image(tmp_path: Path) -> None:
    stored = [image_file(i, width=SIZE, height=SIZE, kind="PNG") for i in range(IMAGES)]
    stored[7] = b"garbage"
    shards = write_shards(tmp_path, stored=[stored], image_size=SIZE)
    check_one_replaced(shards, "0.tar: key7.png cannot be decoded")
    with (
        Stream(shards, config=config_for(shards.root), seed=1) as stream,
        pytest.raises(ValueError, match=r"key7\.png .* all of these images must be intact"),
    ):
        list(stream.parts(images=IMAGES, size=10, rank=0, ranks=1))


def test_each_bad_sample_of_a_batch_counts(tmp_path: Path) -> None:
    stored = [image_file(i, width=SIZE, height=SIZE, kind="PNG") for i in range(IMAGES)]
    stored[7] = stored[8] = b"garbage"
    shards = write_shards(tmp_path, stored=[stored], image_size=SIZE)
    sizes = {"batch_size": IMAGES, "micro_batch_size": IMAGES, "rank": 0, "ranks": 1}
    with Stream(shards, config=config_for(shards.root), seed=1) as stream:
        batches = to_device(stream.batches(images_seen=0, **sizes), device=torch.device("cpu"))
        assert next(batches).bad == stream.bad == 2


def test_a_shard_that_vanishes_stops_the_run(copy: Shards) -> None:
    (Path(copy.root) / "00004.tar").unlink()
    with pytest.raises(ValueError, match=r"00004\.tar is missing"):
        open_shards(copy.root)
    fails(copy, OSError, r"00004\.tar", workers=1)


def test_a_shard_replaced_by_another_of_its_name_stops_the_run(
    copy: Shards, tmp_path: Path
) -> None:
    larger = pack_folder(tmp_path / "larger", images=100, size=2 * SIZE)
    shutil.copy(Path(larger.root) / "00001.tar", Path(copy.root) / "00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar has \d+ bytes, the manifest says"):
        open_shards(copy.root)
    other = pack_folder(tmp_path / "other", images=100, size=SIZE)
    assert other.shards[1].bytes == copy.shards[1].bytes
    shutil.copy(Path(other.root) / "00001.tar", Path(copy.root) / "00001.tar")
    fails(copy, ValueError, r"00001\.tar: .* the index says|00001\.tar: no tar header")


@pytest.mark.parametrize("first", [0, 1])
def test_a_replaced_shard_of_the_same_layout_stops_the_run(copy: Shards, first: int) -> None:
    path = Path(copy.root) / "00001.tar"
    content = bytearray(path.read_bytes())
    for entry in copy.index(1)[first:]:
        content[int(entry["offset"]) + 30] ^= 1
    path.write_bytes(content)
    open_shards(copy.root)
    fails(copy, ValueError, r"00001\.tar: several images have wrong checksums")
    assert "00001.tar" in verify(copy.root, full=True)[0]


def zero_end(shards: Shards) -> None:
    """As a file of the right size whose last blocks were never written."""
    path = Path(shards.root) / "00002.tar"
    size, at = path.stat().st_size, int(shards.index(2)[-1]["offset"]) - 512
    os.truncate(path, at)
    os.truncate(path, size)


def swap(shards: Shards) -> None:
    """As shards under each other's names, of one size."""
    paths = [Path(shards.root) / f"0000{i}.tar" for i in (1, 2)]
    for path, content in zip(paths, [p.read_bytes() for p in reversed(paths)], strict=True):
        path.write_bytes(content)


def link_to_nothing(shards: Shards) -> None:
    """As a merged dataset whose parts are on a disk that is not mounted."""
    path = Path(shards.root) / "00002.tar"
    path.unlink()
    path.symlink_to("/unmounted/00002.tar")


def put_directory(shards: Shards) -> None:
    path = Path(shards.root) / "00002.idx.npy"
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (zero_end, r"00002\.tar has no header of the last image of 00002\.idx\.npy at byte \d+"),
        (swap, r"00001\.tar has no header of the last image|00001\.tar has \d+ bytes"),
        (link_to_nothing, r"00002\.tar is a link to /unmounted/00002\.tar, which does not exist"),
        (put_directory, r"00002\.idx\.npy is missing: the manifest lists it"),
    ],
)
def test_a_shard_that_is_there_in_part_is_found_as_the_dataset_is_opened(
    copy: Shards, damage: Callable[[Shards], None], named: str
) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=named):
        open_shards(copy.root)
    assert re.search(named, verify(copy.root)[0])


def test_a_dataset_behind_a_link_to_nothing_names_the_link(tmp_path: Path) -> None:
    link = tmp_path / "shards"
    link.symlink_to("/unmounted/shards")
    with pytest.raises(ValueError, match="shards is a link to /unmounted/shards, which does not"):
        open_shards(link)


def test_an_index_of_another_packing_is_refused(copy: Shards) -> None:
    """It has the same rows and size, and other labels: they would be trained in silence."""
    path = Path(copy.root) / "00002.idx.npy"
    index = np.load(path)
    index["label"] = (index["label"] + 1) % len(copy.classes)
    path.write_bytes(npy(index))
    message = r"00002\.idx\.npy is damaged or of another packing: .*; copy or pack it again"
    with pytest.raises(ValueError, match=message):
        open_shards(copy.root)
    (fault,) = verify(copy.root)
    assert re.search(message, fault)


def test_a_tar_that_the_manifest_does_not_have_is_said_to_be_unused(
    copy: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "info"):
        assert commands.main([command, copy.root]) == 0
    assert "not in manifest.json" not in capsys.readouterr().out
    config = config_for(copy.root)
    assert data_remarks(copy, held_out=copy, config=config) == []
    (Path(copy.root) / "more.tar").write_bytes(b"")
    for command in ("verify", "info"):
        assert commands.main([command, copy.root]) == 0
        said = f"{copy.root}: 1 tar is not in manifest.json and not read, such as more.tar; "
        assert said in capsys.readouterr().out
    (line,) = data_remarks(copy, held_out=copy, config=config)
    assert line.startswith(said)


def test_wrong_settings_of_reading_are_errors() -> None:
    for seconds in (0.0, np.inf, 1e7):
        with pytest.raises(ValueError, match=r"data.timeout_s = .* at most 1,000,000"):
            config_for("x", timeout_s=seconds)
    with pytest.raises(ValueError, match=r"data.cache_gb = inf: must be above 0, and finite"):
        config_for("x", cache_gb=np.inf)
