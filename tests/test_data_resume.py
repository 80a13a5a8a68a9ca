"""Packing that is killed, met by unreadable files or by a changing source: nothing is lost."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data.dataset import Shards, open_shards, verify
from data.exits import REFUSED, TO_BE_CONTINUED
from data.pack import main, pack
from data.packing.begun import Request
from data.packing.claim import LEFT_OUT, WORK
from data.packing.plan import PackConfig
from tests.support import ranks
from tests.support.data_fixtures import content, image_file, image_files, packed, write_folder

CONFIG = PackConfig(size=16, per_shard=5)


def half_packed(source: Path, out: Path) -> Path:
    """A packing that stopped because a shard cannot be written."""
    (out / "00005.tar").mkdir(parents=True)  # in its way
    (out / WORK).mkdir()
    with pytest.raises(OSError):
        pack(Request(str(source), CONFIG), out=out)
    (out / "00005.tar").rmdir()
    assert (out / "00004.tar").exists() and not (out / "manifest.json").exists()
    return out


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def parquet_of(images: list[bytes], file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table({"image": images, "label": [0] * len(images)}), file)
    return file.parent


def test_no_image_of_another_dataset_gets_in(tmp_path: Path) -> None:
    """Both sets have files of the same names; the first packing was refused."""
    sets = [
        [image_file(10 * i + j, width=20, height=20, kind="PNG") for j in range(10)]
        for i in range(2)
    ]
    first = parquet_of(sets[0], tmp_path / "a" / "train-0.parquet")
    parquet_of(sets[0], tmp_path / "a" / "train-1.parquet")
    (first / "train-1.parquet").write_bytes(b"PAR1 damaged")
    second = parquet_of(sets[1], tmp_path / "b" / "train-0.parquet")
    out = tmp_path / "out"
    assert main([str(first), str(out), "--size", "16", "--workers", "1"]) == REFUSED
    assert not out.exists()
    assert main([str(second), str(out), "--size", "16", "--workers", "1"]) == 0
    assert content(open_shards(out)) == content(packed(second, tmp_path / "clean"))


def test_parquet_of_the_same_name_is_not_taken_from_what_was_unpacked(tmp_path: Path) -> None:
    sets = [[image_file(40 * i + j, width=20, height=20) for j in range(40)] for i in range(2)]
    source = parquet_of(sets[0], tmp_path / "a" / "train-0.parquet")
    out = half_packed(source, tmp_path / "out")
    unpacked = list((out / WORK).glob("*.blob"))
    assert len(unpacked) == 1
    parquet_of(sets[1], tmp_path / "a" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet was changed since the packing began"):
        pack(Request(str(source), CONFIG), out=out, max_bad=0)


def test_a_file_added_since_costs_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    clean = packed_with(source, tmp_path / "clean")
    out = half_packed(source, tmp_path / "out")
    before = times(out)
    del before["00001.tar"]
    damaged = (out / "00001.tar").read_bytes()[:-1] + b"x"
    (out / "00001.tar").write_bytes(damaged)
    (source / "n0001" / "added.png").write_bytes(image_file(9, width=20, height=20, kind="PNG"))
    (source / "n0007").mkdir()
    pack(Request(str(source), CONFIG), out=out)
    assert open_shards(out).fingerprint == clean.fingerprint and verify(out, full=True) == []
    assert before.items() <= times(out).items()
    with pytest.raises(ValueError, match="n0007"):  # a new packing sees it
        pack(Request(str(source), CONFIG), out=tmp_path / "new")


def packed_with(source: Path, out: Path) -> Shards:
    pack(Request(str(source), CONFIG), out=out)
    return open_shards(out)


def test_other_options_and_files_are_another_dataset(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    out = half_packed(source, tmp_path / "out")
    other = write_folder(tmp_path / "other", images=40)  # of the same names
    with pytest.raises(ValueError, match=r"\(unfinished; SOURCE was .*/source, is .*/other\)"):
        pack(Request(str(other), CONFIG), out=out)
    with pytest.raises(ValueError, match=r"another dataset \(unfinished; --seed was 0, is 1\)"):
        pack(Request(str(source), PackConfig(size=16, per_shard=5, seed=1)), out=out)
    (out / WORK / "begun.json").unlink()
    with pytest.raises(
        ValueError, match=r"begun by an earlier release\): .*remove it to pack anew"
    ):
        pack(Request(str(source), PackConfig(size=16, per_shard=5, seed=1)), out=out)


def test_what_cannot_be_read_is_left_out_and_tried_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    clean = packed_with(source, tmp_path / "clean")
    files = [path for path, _ in image_files(source)]
    kept = {path: path.read_bytes() for path in files[:3]}
    files[0].unlink()
    files[0].symlink_to(files[0])  # ELOOP
    files[1].write_bytes(b"damaged")
    files[2].unlink()
    files[2].symlink_to("nowhere")  # ENOENT
    out = tmp_path / "out"
    assert pack(Request(str(source), CONFIG), out=out) == 3
    report = (out / LEFT_OUT).read_text()
    assert "cannot be read (Too many levels of symbolic links)" in report
    assert "cannot be read (No such file or directory)" in report
    assert open_shards(out).count == 37 and verify(out, full=True) == []
    assert pack(Request(str(source), CONFIG), out=out) == 0, "it is finished"

    before = times(out)
    for path, image in kept.items():
        path.unlink()
        path.write_bytes(image)
    assert pack(Request(str(source), CONFIG), out=out, again=True) == 0
    assert open_shards(out).fingerprint == clean.fingerprint
    assert not (out / LEFT_OUT).exists() and not (out / WORK).exists()
    untouched = before.items() & times(out).items()
    assert 8 - 3 <= len(untouched) < 8


def test_a_continued_packing_counts_what_it_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, exif = write_folder(tmp_path / "source", images=40), Image.Exif()
    exif[0x0112] = 6
    grey = np.full((10, 10), 90, np.uint16)
    grey[0] = 80
    for path, _ in image_files(source):
        Image.fromarray(grey).save(path, format="PNG", transparency=80, exif=exif)
    half_packed(source, tmp_path / "out")
    for out in ("out", "whole"):
        capsys.readouterr()
        pack(Request(str(source), CONFIG), out=tmp_path / out)
        line = capsys.readouterr().err.splitlines()[-1]
        for counted in ("transparency", "of 16 bits", "an EXIF", "smaller than 16 pixels"):
            assert re.search(f", 40 (with )?{counted}", line), line


def test_an_image_edited_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    out = half_packed(source, tmp_path / "out")
    for path, _ in image_files(source):
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"images were left out .* was changed since"):
        pack(Request(str(source), CONFIG), out=out)
    assert pack(Request(str(source), CONFIG), out=out, max_bad=1) == 15
    assert pack(Request(str(source), CONFIG), out=out, again=True) == 0


def test_more_than_max_bad_stops_and_is_continued(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    clean = packed_with(source, tmp_path / "clean")
    moved = (source / "n0001").rename(tmp_path / "moved")
    (source / "n0001").mkdir()
    for path in moved.iterdir():
        (source / "n0001" / path.name).symlink_to(path)
    away = moved.rename(tmp_path / "away")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"11 images were left out .*--max-bad allows 10"):
        pack(Request(str(source), CONFIG), out=out)
    away.rename(moved)
    source = source.rename(tmp_path / "renamed")
    assert pack(Request(str(source), CONFIG), out=out) == 0
    assert open_shards(out).fingerprint == clean.fingerprint


def test_a_set_of_undecodable_images_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "source" / "a" / f"{i}.avif").write_bytes(b"\0\0\0 ftypavif" + b"\0" * 40)
    with pytest.raises(ValueError, match="none of 4 images can be decoded"):
        pack(Request(str(tmp_path / "source"), CONFIG), out=tmp_path / "out")


def test_what_is_no_file_is_left_out_and_listed(tmp_path: Path) -> None:
    """Reading a named pipe would wait for ever, and a device may never end."""
    source = write_folder(tmp_path / "source", images=12)
    os.mkfifo(source / "n0001" / "pipe.png")
    (source / "n0001" / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "n0002" / "socket.png"))
        assert pack(Request(str(source), CONFIG), out=tmp_path / "out") == 3
    lines = (tmp_path / "out" / LEFT_OUT).read_text().splitlines()
    names = ["n0001/device.png", "n0001/pipe.png", "n0002/socket.png"]
    assert sorted(lines) == [
        f"{name}: it is a named pipe, a socket or a device, not a file" for name in names
    ]
    assert open_shards(tmp_path / "out").count == 12


def test_names_of_any_bytes_are_packed_and_listed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=20)
    latin = os.fsencode(source / "n0001") + b"/caf\xe9.png"
    with open(latin, "wb") as file:
        file.write(b"damaged")
    with open(latin.replace(b"caf", b"th"), "wb") as file:
        file.write(image_file(0, width=20, height=20))
    assert pack(Request(str(source), CONFIG), out=tmp_path / "out") == 1
    assert b"n0001/caf\xe9.png: " in (tmp_path / "out" / LEFT_OUT).read_bytes()
    assert open_shards(tmp_path / "out").count == 21


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_packing_leaves_no_process_and_is_continued(
    tmp_path: Path, number: signal.Signals
) -> None:
    source = write_folder(tmp_path / "source", images=40)
    slow = source / "n0001" / "img_0.JPEG"
    image = slow.read_bytes()
    # Pillow decodes QOI in Python, pixel by pixel: this one takes far longer than the other shards.
    slow.write_bytes(b"qoif" + struct.pack(">II2B", 6000, 6000, 3, 0))
    os.truncate(slow, 14 + 6000 * 6000 + 8)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.pack", str(source), str(out)]
    process = subprocess.Popen(
        [*command, "--size", "16", "--per-shard", "5", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ranks.environment(),
    )
    deadline = time.monotonic() + ranks.LIMIT
    while not list(out.glob("0*.tar")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)  # as Slurm does, and a terminal with SIGINT
    else:
        process.send_signal(number)
    status = process.wait(ranks.LIMIT)
    assert process.stderr is not None
    text = process.stderr.read()  # ends when no process of it has the pipe any more
    assert status == (-number if number == signal.SIGKILL else TO_BE_CONTINUED)
    if number != signal.SIGKILL:
        stopped = [line for line in text.splitlines() if not line.startswith("packed ")]
        assert stopped == [
            f"packing stopped by {number.name}; rerun the same command to continue; "
            "finished shards are kept"
        ]
    slow.write_bytes(image)
    assert pack(Request(str(source), CONFIG), out=out) == 1, "it was changed"
    assert pack(Request(str(source), CONFIG), out=out, again=True) == 0
    assert verify(out, full=True) == [] and not list(out.glob("*partial*"))


def test_a_directory_that_cannot_be_listed_is_refused() -> None:
    if os.geteuid():
        pytest.skip("only root can become a user without the right")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        source = write_folder(Path(place) / "source", images=6)
        (source / "n0001").chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"directory n0001 cannot be listed .*Permission"):
                pack(Request(str(source), CONFIG), out=Path(place) / "out")
        finally:
            os.seteuid(0)


def test_a_link_to_a_directory_above_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "source", images=8)
    clean = packed_with(source, tmp_path / "clean")
    (source / "n0001" / "up").symlink_to("..")
    (source / "n0002" / "here").symlink_to(source / "n0002")
    linked = tmp_path / "n0000"
    (source / "n0000").rename(linked)
    (source / "n0000").symlink_to(linked)  # a link elsewhere is
    capsys.readouterr()
    assert packed_with(source, tmp_path / "out").fingerprint == clean.fingerprint
    assert "2 skipped (.link-to-a-directory-above 2)" in capsys.readouterr().err
