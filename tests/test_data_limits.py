"""Full and odd disks, and few open files: nothing finished is lost, and nothing needs more."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data import files, pack
from data.dataset import Shards, open_shards, verify
from data.exits import FAILED
from tests.support import ranks
from tests.support.data_fixtures import image_file, pack_folder, write_shards
from tests.support.faults import full_disk


def test_packing_to_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = pack_folder(tmp_path, images=40)
    (Path(done.root) / "manifest.json").unlink()
    (Path(done.root) / "00003.tar").unlink()
    sizes = [shard.bytes for shard in done.shards]
    arguments = [str(tmp_path / "source"), str(tmp_path / "again"), "--size", "16"]
    arguments += ["--per-shard", "9", "--workers", "1"]
    with full_disk(max(sizes) - 1024):
        assert pack.main(arguments) == FAILED
    said = capfd.readouterr().err
    assert "File too large" in said and "rerun the same command" in said
    assert not (tmp_path / "again" / "manifest.json").exists()
    assert pack.main(arguments) == 0
    assert open_shards(tmp_path / "again").fingerprint == done.fingerprint
    assert verify(tmp_path / "again", full=True) == []


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """More shards than `few_files` allows files to be open."""
    stored = [[image_file(i, width=4, height=4, kind="PNG")] for i in range(300)]
    return write_shards(tmp_path_factory.mktemp("many"), stored=stored, image_size=4)


def few_files(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python where a process may hold 256 files open, and may not raise that."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=ranks.LIMIT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_more_shards_than_files_may_be_open(many: Shards, workers: int) -> None:
    script = (
        "import sys\n"
        "from data.dataset import open_shards\n"
        "from data.stream import DataConfig, Stream\n"
        f"config = DataConfig(shards=sys.argv[1], image_size=4, streams=1, workers={workers})\n"
        "with Stream(open_shards(sys.argv[1]), config=config, seed=0) as stream:\n"
        "  sizes = {'batch_size': 100, 'micro_batch_size': 100}\n"
        "  batches = stream.batches(images_seen=0, rank=0, ranks=1, **sizes)\n"
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


def test_a_file_system_that_cannot_sync_directories_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SMB's and some others that programs mount."""
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    files.write(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
