"""The data layer's commands: exit statuses, help, and what a refused command leaves behind."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from data import files, pack, pool, shards
from data.dataset import open_shards
from data.exits import FAILED, REFUSED, CommandParser, exit_status, reported
from data.packing.begun import Request
from data.packing.class_maps import map_content
from data.packing.plan import PackConfig
from data.progress import duration
from tests.support.data_fixtures import write_folder
from trainer import evaluate, sample
from trainer.adm.ema import Profile
from trainer.config import ds_config, settings
from trainer.ema import Stored
from trainer.sampling import labels
from trainer.sampling.npz_output import NpzOutput
from trainer.sampling.samplefile import open_samples
from trainer.snapshots import Snapshot


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((error, REFUSED) for error in (ValueError(), ImportError(), FileNotFoundError())),
        (OSError(36, "File name too long"), REFUSED),
        *((error, FAILED) for error in (OSError(28, "No space left"), BrokenExecutor())),
    ],
)
def test_user_errors_are_refused_and_faults_of_the_machine_are_failures(
    error: Exception, status: int
) -> None:
    assert exit_status(error) == status


def test_descriptions_keep_their_line_breaks() -> None:
    said = CommandParser(prog="p", description="Title.\n\n  first     one\n  second    two")
    assert "\n  first     one\n  second    two\n" in said.format_help()


def test_a_command_runs_without_docstrings() -> None:
    """As with PYTHONOPTIMIZE=2."""
    command = [sys.executable, "-OO", "-m", "data.shards", "--help"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--rum=x", "unrecognized arguments: --rum=x (nearest: --run)"),
        ("--training.lr", " (a setting: --set 'training.lr = VALUE', as in the file)"),
        ("training.lr=3", " (a setting: --set 'training.lr = VALUE', as in the file)"),
        ("lr=3", "unrecognized arguments: lr=3"),
        ("--cards", "unrecognized arguments: --cards"),
    ],
)
def test_an_unknown_option_has_a_hint(
    given: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser(prog="p")
    for option in ("--run", "--set"):
        parser.add_argument(option)
    with pytest.raises(SystemExit):
        parser.parse_args([given])
    assert capsys.readouterr().err.endswith(f"{hint}\n")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's, while this process is another user."""
    if os.geteuid():
        pytest.skip("only root can become a user without the right")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        (Path(place) / "closed").mkdir(mode=0o700)
        for name in ("secret", "state.json", "manifest.json", "labels.npy"):
            (Path(place) / name).touch(mode=0o600)
        os.seteuid(65534)
        try:
            yield Path(place)
        finally:
            os.seteuid(0)


def test_a_right_that_a_user_lacks_is_named_with_who_can_give_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def use(path: Path) -> int:
        path.open("rb" if path.name == "secret" else "ab").close()
        return 0

    closed, secret = place / "closed", place / "secret"
    for path in (secret, closed / "a", place / "new"):
        assert reported(partial(use, path)) == REFUSED
    me, way = pwd.getpwuid(65534).pw_name, "let root chmod it, or give another path"
    assert capsys.readouterr().err.splitlines() == [
        f"error: user {me} may not {what} {path}, which belongs to root (mode {mode}): {way}"
        for what, path, mode in (
            ("read", secret, 600),
            ("enter", closed, 700),
            ("write", place, 755),
        )
    ]


@pytest.mark.parametrize(
    ("use", "path", "denied"),
    [
        (settings.read, "secret", "read {}/secret"),
        (ds_config.load, "secret", "read {}/secret"),
        (open_shards, "", "read {}/manifest.json"),
        (map_content, "secret", "read {}/secret"),
        (partial(labels._text, option="--classes"), "secret", "read {}/secret"),
        (labels._array, "labels.npy", "read {}/labels.npy"),
        (open_samples, "secret", "read {}/secret"),
        (Snapshot.read, "", "read {}/state.json"),
        (lambda path: Stored(path, "", Profile(1, 0.1)).load(), "secret", "read {}/secret"),
        (partial(files.make_parent, option="--out"), "a", "write {}"),
        (partial(files.make_parent, option="--out"), "new/a", "write {}"),
        (
            lambda path: NpzOutput(path, size=4, request={"images": 1, "batch": 1}).open(),
            "a.npz",
            "write {}",
        ),
    ],
)
def test_a_refused_path_has_no_words_of_pythons_own(
    use: Callable[[Path], object],
    path: str,
    denied: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reported(lambda: use(place / path) and 0) == REFUSED
    said, me = capsys.readouterr().err, pwd.getpwuid(65534).pw_name
    assert f"user {me} may not {denied.format(place)}, which belongs to root (mode " in said
    assert "Errno" not in said and "damaged" not in said


def test_ctrl_c_is_one_line(capfd: pytest.CaptureFixture) -> None:
    assert reported(lambda: signal.raise_signal(signal.SIGINT) or 0) == 128 + signal.SIGINT
    assert capfd.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("words", ["trainer.config digits", "trainer.train --version"])
def test_a_closed_output_is_no_fault(words: str) -> None:
    command = f"{sys.executable} -m {words} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command]).returncode == 0


def test_an_interruption_ends_processes_that_are_waited_for() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        pool.interrupted_by_signals(),
        pool.processes(1) as executor,
    ):
        executor.submit(os.kill, os.getpid(), signal.SIGTERM)
        executor.submit(time.sleep, 30)
    deadline = time.monotonic() + 10
    while active_children():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_packing_that_fails_has_ended_its_thread(tmp_path: Path) -> None:
    """A thread of the executor that closes its pipe as Python ends would print a traceback."""
    source = write_folder(tmp_path / "source", images=40)
    (source / "n0001" / "img_0.JPEG").write_bytes(b"damaged")
    before = threading.enumerate()
    with pytest.raises(ValueError, match="--max-bad allows 0"):
        pack.pack(
            Request(str(source), PackConfig(size=16, per_shard=2)),
            out=tmp_path / "out",
            max_bad=0,
            executor=pool.processes(2),
        )
    assert threading.enumerate() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "--size = 0: must be at least 1"),
        (["--quality", "101"], "--quality = 101: must be from 1 to 100"),
        (["--seed", str(2**64)], "--seed = 18446744073709551616: must be between"),
        (["--workers", "0"], "--workers = 0: must be at least 1"),
        (["--class-map", "nowhere"], "--class-map = nowhere cannot be read"),
        (["--classes-of", "nowhere"], "no dataset at nowhere"),
        (["--mpi"], "--mpi needs at least 2 ranks of mpi4py.futures: run `mpirun -n N"),
    ],
)
def test_a_wrong_option_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = write_folder(tmp_path / "source", images=3)
    assert (
        pack.main([str(source), str(tmp_path / "a" / "b"), "--workers", "1", *options]) == REFUSED
    )
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_source_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack.main(["/nowhere", str(tmp_path / "a" / "b" / "c")]) == REFUSED
    (tmp_path / "empty").mkdir()
    assert pack.main(["/nowhere", str(tmp_path / "empty")]) == REFUSED
    assert pack.main(["https://USER:SECRET@host/a", str(tmp_path / "empty")]) == REFUSED
    assert "SECRET" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (pack.main, ["", "out"]),
        (pack.main, ["digits", "out", "--classes-of", ""]),
        (shards.main, ["verify", " "]),
        (shards.main, ["merge", "out", "a", ""]),
    ],
)
def test_an_empty_variable_is_not_the_working_directory(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(REFUSED)):
        main(arguments)
    assert "is no path: is a variable empty?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (pack.main, ["digits", "s3://USER:SECRET@bucket/out?sig=SECRET"]),
        (shards.main, ["merge", "https://USER:SECRET@host/out?sig=SECRET", "a", "b"]),
        (evaluate.main, ["reference", "https://USER:SECRET@host/a?sig=SECRET", "--out", "b.npz"]),
        (sample.main, ["run", "--out", "s3://USER:SECRET@bucket/a.npz?sig=SECRET"]),
    ],
)
def test_a_url_in_the_place_of_a_path_is_refused_without_its_password(
    main: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(REFUSED)):
        main(arguments)
    said = capsys.readouterr().err
    assert "?sig=***' is no path on this machine" in said and "SECRET" not in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip"])
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.zip").write_bytes(content)
    assert pack.main([str(tmp_path / "images.zip"), str(tmp_path / "out")]) == REFUSED


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3.0, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (2 * 3600 + 12 * 60, "2 h 12 min"),
        (27 * 3600 + 59, "1 d 3 h"),
        (40 * 86400, "40 d 0 h"),
    ],
)
def test_durations_keep_their_days(seconds: float, words: str) -> None:
    assert duration(seconds) == words
