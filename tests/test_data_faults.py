"""Whatever breaks: nothing hangs, nothing is lost or doubled silently, the message says what."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.blobs import Blobs
from data.cache import CHUNK
from data.fetch import FetchConfig
from data.shards import Shards, open_shards, verify
from data.stream import Batch, DataConfig, Stream
from tests import ranks
from tests.data_fixtures import image_file, pack_folder, write_shards
from tests.data_server import serving

SIZE = 16
IMAGES = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return pack_folder(tmp_path_factory.mktemp("whole"), images=IMAGES, size=SIZE)


@pytest.fixture
def copy(whole: Shards, tmp_path: Path) -> Shards:
    """A dataset that a test may damage after it was opened."""
    return open_shards(shutil.copytree(whole.root, tmp_path / "copy"))


def config_for(root: str, **changes: object) -> DataConfig:
    config = DataConfig(shards=root, image_size=SIZE, streams=4, block=8, workers=0, retries=1)
    return replace(config, **changes)  # type: ignore[arg-type]


def take(stream: Stream, *, images: int = 2 * IMAGES) -> list[Batch]:
    batches = stream.batches(images=0, batch=12, micro_batch=12, rank=0, ranks=1)
    return list(islice(batches, images // 12))


def epoch(root: str | Path, **changes: object) -> list[bytes]:
    """The pixels of two epochs."""
    config = config_for(str(root), **changes)
    with Stream(open_shards(root, fetch=config), config=config, seed=1) as stream:
        batches = take(stream)
        assert stream.served == 2 * IMAGES and stream.bad == 0
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


def rewrite(shards: Shards, shard: int, *, at: int, flip: int) -> None:
    path = Path(shards.root) / shards.shards[shard].tar
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    path.write_bytes(content)


def fails(shards: Shards, kind: type[Exception], pattern: str, **changes: object) -> None:
    with (
        Stream(shards, config=config_for(shards.root, **changes), seed=1) as stream,
        pytest.raises(kind, match=pattern),
    ):
        take(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_stops_the_run(copy: Shards, workers: int) -> None:
    path = Path(copy.root) / "00002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    named = r"00002\.tar: reading stopped at byte \d+ .*bytes early; wanted was (image|\d{8}-img)"
    fails(copy, OSError, named, workers=workers)


def test_a_tar_cut_inside_an_image_names_it(copy: Shards) -> None:
    path = Path(copy.root) / "00002.tar"
    entry = copy.index(2)[3]
    with path.open("rb") as tar:
        tar.seek(int(entry["offset"]) - 512)
        key = tar.read(100).partition(b".")[0].decode()
    os.truncate(path, int(entry["offset"]) + 20)
    blobs = Blobs(copy, config=FetchConfig(retries=0))
    with pytest.raises(OSError, match=rf"00002\.tar: .* wanted was {key}, at byte"):
        blobs.read(2, 3)


def test_a_flipped_header_bit_stops_the_run(copy: Shards) -> None:
    header = int(copy.index(3)[2]["offset"]) - 512
    rewrite(copy, 3, at=header + 5, flip=1)
    fails(copy, ValueError, rf"00003\.tar: no tar header of \d{{8}}-img_\d+ at byte {header}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_payload_byte_costs_one_image(copy: Shards, workers: int) -> None:
    entry = copy.index(3)[2]
    rewrite(copy, 3, at=int(entry["offset"]) + int(entry["size"]) // 2, flip=255)
    check_one_replaced(copy, r"00003.tar: ", "does not have the checksum", workers=workers)


def check_one_replaced(shards: Shards, *needles: str, workers: int = 0) -> None:
    """Exactly the one bad sample is replaced, counted and named, epoch after epoch."""
    lines: list[str] = []
    config = config_for(shards.root, workers=workers, flip=False)
    with Stream(shards, config=config, seed=1, log=lines.append) as stream:
        batches = take(stream)
        assert stream.bad == len(lines) == 2
    assert all(needle in line for needle in needles for line in lines)
    for e in range(2):
        pixels = [i.numpy().tobytes() for b in batches[5 * e : 5 * e + 5] for i in b.images]
        assert len(pixels) == IMAGES and len(set(pixels)) == IMAGES - 1


def test_an_undecodable_image_costs_one_image(tmp_path: Path) -> None:
    blobs = [image_file(i, width=SIZE, height=SIZE, kind="PNG") for i in range(IMAGES)]
    blobs[7] = b"garbage"
    shards = write_shards(tmp_path, blobs=[blobs], image_size=SIZE)
    check_one_replaced(shards, "0.tar: key7.png cannot be decoded")
    with (
        Stream(shards, config=config_for(shards.root), seed=1) as stream,
        pytest.raises(ValueError, match=r"key7\.png .* a validation split must be whole"),
    ):
        list(stream.once(micro_batch=10, rank=0, ranks=1))


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


def test_a_replaced_shard_of_the_same_layout_stops_the_run(copy: Shards) -> None:
    path = Path(copy.root) / "00001.tar"
    content = bytearray(path.read_bytes())
    for entry in copy.index(1):
        content[int(entry["offset"]) + 30] ^= 1
    path.write_bytes(content)
    open_shards(copy.root)
    fails(copy, ValueError, r"00001\.tar: several images do not have their checksums")
    assert "00001.tar" in verify(copy.root, full=True)[0]


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
        assert epoch(url, timeout_s=1.0, retries=8) == epoch(whole.root)


def test_a_dead_http_server_is_one_clear_error(whole: Shards) -> None:
    with serving(
        Path(whole.root), fault=lambda n, path: "503" if path == "/00002.tar" else None
    ) as url:
        fails(
            open_shards(url), OSError, r"00002\.tar: reading stopped at byte \d+ after 2 attempts"
        )
    with serving(Path(whole.root), fault=lambda n, path: "no ranges") as url:
        fails(open_shards(url), ValueError, r"does not serve byte ranges")


def test_a_missing_remote_shard_is_found_before_training(copy: Shards) -> None:
    (Path(copy.root) / "00004.tar").unlink()
    with (
        serving(Path(copy.root), fault=lambda n, path: None) as url,
        pytest.raises(ValueError, match=r"00004\.tar is missing"),
    ):
        open_shards(url)


def test_pipes_serve_the_same(whole: Shards, tmp_path: Path) -> None:
    seeking = f"pipe:tail -c +$(({{first}} + 1)) {whole.root}/{{name}}; : {{last}}"
    assert epoch(seeking) == epoch(whole.root)
    forward = f"pipe:cat {whole.root}/{{name}}"
    assert epoch(forward, cache=str(tmp_path)) == epoch(whole.root)
    with pytest.raises(ValueError, match=r"or give the node a data.cache"):
        epoch(forward)
    with pytest.raises(ValueError, match=r"manifest.json cannot be read: .* exit status 1"):
        open_shards("pipe:cat /nowhere/{name}", fetch=FetchConfig(retries=1))


def test_a_pipe_that_stalls_is_left(whole: Shards) -> None:
    sleep = f"sleep 600.{os.getpid()}"  # no other process on the machine is called so
    stalling = f"pipe:case {{name}} in *.tar) {sleep};; *) cat {whole.root}/{{name}};; esac"
    config = config_for(f"{stalling}; : {{first}} {{last}}", timeout_s=2.0, retries=1)
    with (
        Stream(open_shards(config.shards, fetch=config), config=config, seed=1) as stream,
        pytest.raises(OSError, match=r"byte \d+ after 2 attempts: the command wrote nothing"),
    ):
        take(stream)
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert sleep.split() not in left


@pytest.mark.parametrize("workers", [0, 2])
def test_file_systems_of_fsspec_serve_the_same(whole: Shards, workers: int) -> None:
    assert epoch(f"file://{whole.root}", workers=workers) == epoch(whole.root)


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


def test_redirections_are_followed(whole: Shards) -> None:
    with serving(Path(whole.root), fault=lambda n, path: None) as url:
        assert epoch(f"{url}/moved") == epoch(whole.root)


def test_a_damaged_index_in_the_cache_is_fetched_again(whole: Shards, tmp_path: Path) -> None:
    with serving(Path(whole.root), fault=lambda n, path: None) as url:
        assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
        (index,) = tmp_path.glob("*/00003.idx.npy")
        good = index.read_bytes()
        for bad in (good[:-1] + b"x", good[:50]):
            index.write_bytes(bad)
            assert epoch(url, cache=str(tmp_path)) == epoch(whole.root)
            assert index.read_bytes() == good


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


def test_a_full_cache_disk_costs_speed_only(whole: Shards, tmp_path: Path) -> None:
    """A limit on the size of files is a disk that is full for all but small ones."""
    script = (
        "import sys, resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from tests.test_data_faults import epoch\n"
        f"assert epoch(sys.argv[1], cache={str(tmp_path)!r}) == epoch({whole.root!r})\n"
    )
    with serving(Path(whole.root), fault=lambda n, path: None) as url:
        done = subprocess.run(
            [sys.executable, "-c", script, url], capture_output=True, text=True, timeout=ranks.LIMIT
        )
    assert done.returncode == 0, done.stderr
    assert "File too large; reading on without it" in done.stderr
    assert not any(path.is_file() and path.stat().st_size > 4096 for path in tmp_path.rglob("*"))


def test_packing_to_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    done = pack_folder(tmp_path, images=40)
    (Path(done.root) / "manifest.json").unlink()
    (Path(done.root) / "00003.tar").unlink()
    sizes = [shard.bytes for shard in done.shards]
    arguments = [sys.executable, "-m", "data.pack", str(tmp_path / "source")]
    arguments += [str(tmp_path / "again"), "--size", "16", "--per-shard", "9", "--workers", "1"]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=ranks.LIMIT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    stopped = run(max(sizes) - 1024)
    assert stopped.returncode == 1
    assert "File too large" in stopped.stderr and "the same command continues" in stopped.stderr
    assert not (tmp_path / "again" / "manifest.json").exists()
    assert run(10**9).returncode == 0
    assert open_shards(tmp_path / "again").fingerprint == done.fingerprint
    assert verify(tmp_path / "again", full=True) == []


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """More shards than `few_files` allows files to be open."""
    blobs = [[image_file(i, width=4, height=4, kind="PNG")] for i in range(300)]
    return write_shards(tmp_path_factory.mktemp("many"), blobs=blobs, image_size=4)


def few_files(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python where a process may hold 256 files open, and may not raise that."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_more_shards_than_files_may_be_open(many: Shards, workers: int) -> None:
    script = (
        "import sys\n"
        "from data.shards import open_shards\n"
        "from data.stream import DataConfig, Stream\n"
        f"config = DataConfig(shards=sys.argv[1], image_size=4, streams=1, workers={workers})\n"
        "with Stream(open_shards(sys.argv[1]), config=config, seed=0) as stream:\n"
        "  batches = stream.batches(images=0, batch=100, micro_batch=100, rank=0, ranks=1)\n"
        "  seen = {int(label) for _ in range(6) for label in next(batches).labels}\n"
        "print(len(seen))\n"
    )
    done = few_files(["-c", script, many.root])
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr


@pytest.mark.parametrize("command", ["info", "verify", "index"])
def test_commands_on_more_shards_than_files_may_be_open(
    many: Shards, tmp_path: Path, command: str
) -> None:
    root = Path(shutil.copytree(many.root, tmp_path / "many"))
    if command == "index":
        (root / "manifest.json").unlink()
    done = few_files(["-m", "data.shards", command, str(root)])
    assert done.returncode == 0, done.stderr


def test_a_command_raises_the_soft_limit_of_open_files(many: Shards) -> None:
    script = (
        "import resource, sys\n"
        "from data.shards import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n"
        "assert main(['verify', sys.argv[1]]) == 0\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)\n"
    )
    done = few_files(["-c", script, many.root])
    assert done.returncode == 0, done.stderr


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children() if "data.workers" in p.cmdline()]


def test_a_killed_worker_is_one_clear_error(whole: Shards) -> None:
    with Stream(whole, config=config_for(whole.root, workers=2), seed=1) as stream:
        batches = stream.batches(images=0, batch=12, micro_batch=12, rank=0, ranks=1)
        next(batches)
        workers_of(psutil.Process())[0].send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"data worker \d .* died with exit status -9"):
            for _ in islice(batches, 1000):
                pass
    assert not workers_of(psutil.Process())


def test_workers_outlive_signals_but_not_the_trainer(whole: Shards) -> None:
    script = (
        "import sys\n"
        "from data.shards import open_shards\n"
        "from data.stream import Stream\n"
        "from tests.test_data_faults import config_for\n"
        "with Stream(open_shards(sys.argv[1]), config=config_for(sys.argv[1], workers=2), seed=1)"
        " as stream:\n"
        "  for _ in stream.batches(images=0, batch=4, micro_batch=4, rank=0, ranks=1):\n"
        "    print('served', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, whole.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as trainer:
        assert trainer.stdin and trainer.stdout
        assert trainer.stdout.readline() == b"served\n"
        workers = workers_of(psutil.Process(trainer.pid))
        assert len(workers) == 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            workers[0].send_signal(number)
        for _ in range(40):
            trainer.stdin.write(b"\n")
            trainer.stdin.flush()
            assert trainer.stdout.readline() == b"served\n"
        trainer.kill()
    gone, alive = psutil.wait_procs(workers, timeout=ranks.LIMIT)
    assert len(gone) == 2 and not alive


def test_wrong_settings_of_reading_are_errors() -> None:
    with pytest.raises(ValueError, match=r"data.timeout_s = 0"):
        config_for("x", timeout_s=0)
    assert np.isclose(config_for("x").timeout_s, 30)
