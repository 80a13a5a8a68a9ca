"""Servers, pipes and disks that fail: reading resumes where it was, or one error says why."""

import errno
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import psutil
import pytest

from data import reader
from data.config import FetchConfig
from data.dataset import Shards, open_shards, verify
from data.stores import _LARGE, LocalStore
from data.stream import Stream
from tests.support.cluster import wait_until
from tests.support.data_server import serving
from tests.support.data_streams import config_for, epoch, fails, take


@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_http_server_changes_nothing(whole: Shards, tmp_path: Path, cached: bool) -> None:
    faults = ["503", "short", "reset"] + 40 * [None]
    with serving(Path(whole.root), fault=lambda n, path: faults[n % 43]) as url:
        cache = str(tmp_path / "cache") if cached else None
        assert epoch(url, workers=2, retries=8, cache=cache) == epoch(whole.root)
        assert epoch(url, retries=8, cache=cache) == epoch(whole.root)


def test_a_stalling_http_server_is_left_and_asked_again(whole: Shards) -> None:
    stalls = {3, 17}
    with serving(Path(whole.root), fault=lambda n, path: "stall" if n in stalls else None) as url:
        assert epoch(url, timeout_s=0.5, retries=8) == epoch(whole.root)


def test_a_dead_http_server_is_one_clear_error(whole: Shards) -> None:
    with serving(
        Path(whole.root), fault=lambda n, path: "503" if path == "/00002.tar" else None
    ) as url:
        fails(
            open_shards(url), OSError, r"00002\.tar: reading stopped at byte \d+ after 2 attempts"
        )
    with serving(Path(whole.root), fault=lambda n, path: "no ranges") as url:
        fails(open_shards(url), ValueError, r"does not serve byte ranges")


@pytest.mark.parametrize(("place", "told"), [("moved", 2), ("away", 1)])
def test_redirections_are_followed_and_another_host_is_not_told_the_login(
    place: str, told: int, whole: Shards
) -> None:
    seen: list[Message] = []
    with serving(Path(whole.root), seen=seen) as url:
        assert epoch(f"{url.replace('//', '//me:secret@')}/{place}") == epoch(whole.root)
    assert 2 * sum("Authorization" in headers for headers in seen) == told * len(seen) > 0


def test_a_missing_remote_shard_is_found_before_training(copy: Shards) -> None:
    (Path(copy.root) / "00004.tar").unlink()
    with (
        serving(Path(copy.root)) as url,
        pytest.raises(ValueError, match=r"00004\.tar is missing"),
    ):
        open_shards(url)


def test_a_damaged_remote_index_is_no_fault_of_the_machine(copy: Shards) -> None:
    index = Path(copy.root) / "00004.idx.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    with serving(Path(copy.root)) as url:
        shards = open_shards(url)
        fails(shards, ValueError, r"00004\.idx\.npy is damaged or of another packing: its checksum")


def test_an_index_that_is_overwritten_while_it_is_used_is_damaged_and_no_fault_of_the_disk(
    copy: Shards,
) -> None:
    index = Path(copy.root, copy.shards[1].index)
    index.write_bytes(b"\xff" * index.stat().st_size)
    fails(copy, ValueError, r"00001\.idx\.npy is damaged: ")


def test_pipes_serve_the_same(whole: Shards, tmp_path: Path) -> None:
    seeking = f"pipe:tail -c +$(({{first}} + 1)) {whole.root}/{{name}}; : {{last}}"
    assert epoch(seeking) == epoch(whole.root)
    forward = f"pipe:cat {whole.root}/{{name}}"
    assert epoch(forward, cache=str(tmp_path)) == epoch(whole.root)
    assert verify(seeking, full=True) == verify(forward, full=True) == []
    with pytest.raises(ValueError, match=r"or set data.cache"):
        epoch(forward)
    # Status 1: the same command may succeed later.
    with pytest.raises(OSError, match=r"manifest.json cannot be read: .* exit status 1"):
        open_shards("pipe:cat /nowhere/{name}", fetch=FetchConfig(retries=1))


def test_a_pipe_that_stalls_is_left(whole: Shards) -> None:
    sleep = f"sleep 600.{os.getpid()}"  # no other process on the machine is called so
    stalling = f"pipe:case {{name}} in *.tar) {sleep};; *) cat {whole.root}/{{name}};; esac"
    config = config_for(f"{stalling}; : {{first}} {{last}}", timeout_s=1.0, retries=1)
    with (
        Stream(open_shards(config.shards, fetch=config), config=config, seed=1) as stream,
        pytest.raises(OSError, match=r"byte \d+ after 2 attempts: the command wrote nothing"),
    ):
        take(stream)

    def left() -> list[list[str]]:
        return [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]

    # A process that was killed may take a moment to end.
    wait_until(lambda: sleep.split() not in left(), "the end of the pipe's command")


def test_any_number_of_retries_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_LONGEST_PAUSE_S", 0.0)
    with socket.socket() as silent, pytest.raises(OSError, match=r"after 1101 attempts: .*refused"):
        silent.bind(("127.0.0.1", 0))
        open_shards(f"http://127.0.0.1:{silent.getsockname()[1]}", fetch=FetchConfig(retries=1100))


def open_below(root: Path) -> list[str]:
    """The files of a directory that this process has open."""
    opened = [file.path for file in psutil.Process().open_files()]
    return [path for path in opened if path.startswith(f"{root}/")]


def test_a_file_is_not_closed_under_the_read_of_another_thread(tmp_path: Path) -> None:
    """Its number would be another file's by then: wrong bytes, or none."""
    names = [f"{n}.tar" for n in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    store = LocalStore(str(tmp_path), sharers=10**6)  # keeps one file open

    def read(n: int) -> bool:
        name = names[n % len(names)]
        if n % 50 == 0:
            store.close()
        return b"".join(store.pieces(name, first=0, last=500)) == name.encode() * 100

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(read, range(4000)))
    finally:
        sys.setswitchinterval(interval)
    assert read(1) and len(open_below(tmp_path)) == 1
    store.close()
    assert not open_below(tmp_path)


def test_two_epochs_open_each_index_and_each_tar_once(whole: Shards) -> None:
    """Every worker of hundreds of ranks does, at every start: more would crowd a file system."""
    opened: list[str] | None = []

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and opened is not None and str(arguments[0]).startswith(whole.root):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(note)  # which stays
    try:
        with Stream(whole, config=config_for(whole.root), seed=1) as stream:
            take(stream)
        assert sorted(opened) == sorted(n for s in whole.shards for n in (s.tar, s.index))
    finally:
        opened = None


def test_a_file_of_more_than_one_read_is_read_in_full(tmp_path: Path) -> None:
    (tmp_path / "large.tar").touch()
    os.truncate(tmp_path / "large.tar", size := _LARGE + 1)
    pieces = LocalStore(str(tmp_path), sharers=1).pieces("large.tar", first=0, last=size)
    assert sum(map(len, pieces)) == size


@pytest.mark.parametrize("workers", [0, 2])
def test_file_systems_of_fsspec_serve_the_same(whole: Shards, workers: int) -> None:
    assert epoch(f"file://{whole.root}", workers=workers) == epoch(whole.root)


def test_a_failing_disk_is_tried_again(whole: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system is: handles go stale when its server starts again."""
    wanted, read, reads = epoch(whole.root), os.pread, iter(range(10**6))

    def failing(descriptor: int, size: int, at: int) -> bytes:
        number = next(reads)
        if number % 20 == 3:
            os.fstat(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(descriptor, size, at)

    monkeypatch.setattr(os, "pread", failing)
    assert epoch(whole.root) == wanted
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    fails(whole, OSError, r"\d\.idx\.npy: reading stopped at byte \d+ after 2 attempts: .*bad")
