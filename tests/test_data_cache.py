"""A node's cache: damaged, too small or on a full disk, it costs time and nothing else."""

import codecs
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data.cache import CHUNK
from data.dataset import Shards
from tests.support.data_fixtures import pack_folder
from tests.support.data_server import serving
from tests.support.data_streams import epoch
from tests.support.faults import full_disk


def test_a_damaged_cache_is_refetched_and_bounded(whole: Shards, tmp_path: Path) -> None:
    requests = []
    with serving(Path(whole.root), fault=lambda n, path: requests.append(path)) as url:
        assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
        first = len(requests)
        assert first == len(whole.shards)  # each of these tars is one chunk
        (directory,) = tmp_path.iterdir()
        for slot in directory.glob("0000000?"):
            content = bytearray(slot.read_bytes())
            content[8:15000] = b"\xff" * (15000 - 8)
            slot.write_bytes(content)
        assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
        assert len(requests) > first
        little = (CHUNK + 8) * 3 / 2**30
        cache = tmp_path / "little"
        assert epoch(url, cache=str(cache), cache_gb=little) == epoch(whole.root)
        assert len(list(cache.glob("*/0000000?"))) == 3
        less = (CHUNK + 8) / 2**30
        assert epoch(url, cache=str(cache), cache_gb=less) == epoch(whole.root)
    assert [p.name for p in cache.glob("*/*") if p.suffix != ".npy"] == ["00000000"]


def test_all_damaged_chunks_of_an_image_are_fetched_again(
    whole: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cache.CHUNK", 700)  # images lie across several
    wanted = epoch(whole.root)
    assert epoch(whole.root, cache=str(tmp_path)) == wanted
    for slot in tmp_path.glob("*/*[0-9]"):
        slot.write_bytes(slot.read_bytes()[:8] + bytes(slot.stat().st_size - 8))
    assert epoch(whole.root, cache=str(tmp_path)) == wanted


@pytest.mark.slow
def test_a_cache_of_many_chunks_serves_the_same(
    whole: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cache.CHUNK", 1500)  # images and their headers lie across several
    roots = {"forward": f"pipe:cat {whole.root}/{{name}}"}
    with serving(Path(whole.root), fault=lambda n, path: "reset" if n % 7 == 3 else None) as url:
        roots["ranged"] = url
        for name, root in roots.items():
            for chunks in (1000, 5):
                cache = tmp_path / f"{name}-{chunks}"
                some = epoch(root, cache=str(cache), cache_gb=chunks * 1508 / 2**30, retries=4)
                assert some == epoch(whole.root)
                assert 1 < len([p for p in cache.glob("*/*") if not p.suffix]) <= chunks


def test_a_damaged_chunk_that_may_not_be_deleted_is_not_read_again(whole: Shards) -> None:
    """Users share the cache of a node, and one has written it."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        copy, cache = shutil.copytree(whole.root, f"{place}/shards"), f"{place}/cache"
        wanted = epoch(copy, cache=cache)
        for slot in Path(cache).glob("*/*[0-9]"):
            slot.write_bytes(slot.read_bytes()[:8] + bytes(slot.stat().st_size - 8))
        os.seteuid(65534)
        try:
            assert epoch(copy, cache=cache) == wanted
        finally:
            os.seteuid(0)


def test_a_damaged_index_in_the_cache_is_fetched_again(whole: Shards, tmp_path: Path) -> None:
    with serving(Path(whole.root)) as url:
        assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
        (index,) = tmp_path.glob("*/00003.idx.npy")
        good = index.read_bytes()
        for bad in (good[:-1] + b"x", good[:50]):
            index.write_bytes(bad)
            assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
            assert index.read_bytes() == good


def test_a_full_cache_disk_costs_speed_only(
    whole: Shards, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(Path(whole.root)) as url, full_disk(4096):  # full for all but small files
        assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
    assert "File too large; continuing without the cache" in capfd.readouterr().err
    assert not any(path.is_file() and path.stat().st_size > 4096 for path in tmp_path.rglob("*"))


def test_a_full_cache_disk_that_has_the_output_too_costs_speed_only(
    whole: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with io.FileIO("/dev/full", "w") as full, full_disk(4096):
        monkeypatch.setattr(sys, "stderr", codecs.getwriter("utf-8")(full))
        assert epoch(whole.root, cache=str(tmp_path)) == epoch(whole.root)


def test_what_vanishes_as_the_cache_is_opened_does_not_turn_it_off(
    whole: Shards,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another process writes is renamed after the listing: a link to nothing is like that."""
    cache = tmp_path / whole.fingerprint[:16]
    cache.mkdir()
    for n in range(5):
        (cache / f"0000000{n}.77.{n}").symlink_to(tmp_path / "renamed")
    for name in ("99999999", "00000009.77.9", "00000009.78.9"):
        (cache / name).touch()
    os.utime(cache / "00000009.77.9", (0, 0))  # its process was killed
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)  # ahead of the files' clock
    assert epoch(whole.root, cache=str(tmp_path)) == epoch(whole.root)
    assert capfd.readouterr().err == "" and (cache / "00000000").is_file()
    assert not (cache / "99999999").exists() and not (cache / "00000009.77.9").exists()
    assert (cache / "00000009.78.9").exists()


def test_a_mounted_directory_is_cached_too(whole: Shards, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert epoch(whole.root, cache=str(cache)) == epoch(whole.root)
    copy = shutil.copytree(whole.root, tmp_path / "copy")
    wanted = epoch(copy, cache=str(cache))
    other = pack_folder(tmp_path, images=40)
    assert epoch(other.root, cache=str(cache)) == epoch(other.root)  # beside it, not in its place
    for tar in copy.glob("*.tar"):
        with tar.open("r+b") as file:
            file.write(bytes(2048))  # what is read comes from the cache
    assert epoch(copy, cache=str(cache), workers=1) == wanted
