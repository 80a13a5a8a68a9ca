"""What ends a rank: our own errors are a line and 78, a library's or a bug keeps its traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from data.exits import FAILED, REFUSED, is_ours
from data.manifest import parse_manifest
from tests.support import ranks
from trainer.config import settings
from trainer.ranks import signals
from trainer.ranks.ending import no_exit
from trainer.ranks.signals import Preemption
from trainer.run.directory import Run
from trainer.run.runstate import RunState
from trainer.sampling.jobstate import noted

# A locale without Python's ways around it.
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DEEP = "x = " + "[" * 100_000


def raised(act: Callable[[], object]) -> ValueError:
    with pytest.raises(ValueError) as caught:
        act()
    return caught.value


def test_what_we_raise_is_ours_and_what_falls_through_is_not(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("= 1")
    assert is_ours(raised(lambda: settings.read(broken)))
    assert not is_ours(raised(lambda: json.loads("{")))
    assert not is_ours(raised(lambda: settings.add_overrides(int("x"))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [DEEP, DEEP.replace("[", "{a="), "\x00", "x = 1e", "a.b = 1\na = 2"]
)
def test_malformed_toml_is_one_line(tmp_path: Path, text: str) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(text)
    for act in (lambda: settings.read(preset), lambda: settings._parse_change(text)):
        error = raised(act)
        assert is_ours(error) and "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b'{"format": NaN}',
        b'{"format": 1}',
    ],
)
def test_a_malformed_manifest_is_one_line(content: bytes) -> None:
    error = raised(lambda: parse_manifest("here/manifest.json", content))
    assert is_ours(error) and "here/manifest.json" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("preset", "status"), [("nothing", REFUSED), ("{tiny}", FAILED)])
def test_the_status_of_a_trainer_tells_a_user_error_from_a_library_s(
    tmp_path: Path, tiny: Path, preset: str, status: int
) -> None:
    """A variable of DeepSpeed's that it cannot read is nothing that a preset could correct."""
    env = ranks.environment() | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(ranks.free_port())
    command = [sys.executable, "-m", "trainer.train", preset.format(tiny=tiny), "--run", "run"]
    if preset != "nothing":
        env["DS_ACCELERATOR"] = "nothing"
    env["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "error.json")
    done = subprocess.run(command, cwd=ranks.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == (status == FAILED)
    if status == REFUSED:  # what torchrun ends its own report with
        told = ProcessFailure(0, 1, status, env["TORCHELASTIC_ERROR_FILE"])
        assert "unknown preset 'nothing'" in told.message and told.message in done.stderr
        assert abs(told.timestamp - time.time()) < 600


def test_an_executor_that_was_left_open_does_not_keep_a_rank() -> None:
    """Its threads wait for work: those of a stream that reads through `data.cache`, say."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from trainer.ranks.ending import run_as_rank\n"
        "pool = ThreadPoolExecutor(2)\n"
        "run_as_rank(lambda: pool.submit(int).result())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=ranks.LIMIT / 10).returncode == 0


def test_a_library_that_ends_the_process_has_not_finished_the_run(tmp_path: Path) -> None:
    """DeepSpeed's autotuning does so in the fifth step, with status 0."""
    with (
        pytest.raises(RuntimeError, match=r"a library ended this process \(status 0\)"),
        Run(tmp_path).claimed(),
        no_exit(),
    ):
        sys.exit()
    assert json.loads((tmp_path / "launch" / "state.json").read_text())["state"] == "failed"


def be_interrupted(directory: Path, run: bool) -> int:
    """A rank of a run, or of a job that draws, that is interrupted before it could save."""
    signals.PATIENCE = 0.0
    with Preemption() as preemption:
        what = Run(directory).claimed() if run else noted(directory, preemption=preemption)
        with what:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(ranks.LIMIT)
    return 0


@pytest.mark.parametrize("run", [True, False])
def test_an_insistent_ctrl_c_is_one_line_and_recorded(tmp_path: Path, run: bool) -> None:
    job = ranks.fork(tmp_path / "job", partial(be_interrupted, tmp_path, run), ranks=1)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [128 + signal.SIGINT]
    stopping, line = job.text.strip().splitlines()
    assert stopping.startswith("stop requested: ")
    assert line.endswith(": interrupted: what was not saved is lost; rerun the same command")
    state = RunState.read(tmp_path)
    assert state is not None and state.state == "stopped"
    assert (state.why or "").startswith("by Ctrl-C")
    assert not (tmp_path / "launch" / "writer.json").exists()


@pytest.mark.parametrize("errors", ["", ":strict", ":surrogateescape"])
def test_letters_and_bytes_that_the_locale_has_no_code_for_are_printed_as_numbers(
    errors: str,
) -> None:
    """In the C locale Python's own streams have surrogateescape, which fails at letters."""
    say = r"print('\xb1 \udcf6')"
    command = f"from data.exits import CommandParser; CommandParser(); {say}"
    rank = f"from trainer.ranks.ending import run_as_rank; run_as_rank(lambda: {say})"
    streams = {"PYTHONIOENCODING": f"ascii{errors}"} if errors else {}
    for code in (command, rank):
        words = [sys.executable, "-c", code]
        env = {**os.environ, **POSIX, **streams}
        done = subprocess.run(words, cwd=ranks.ROOT, env=env, capture_output=True)
        assert done.stdout == b"\\xb1 \\udcf6\n", done.stderr


WITHOUT_THREADS = """
import os, resource, subprocess, sys, threading
from data.exits import reported
from trainer.ranks.ending import run_as_rank

def work():
    if sys.argv[2] == "thread":
        threading.Thread(target=print).start()
    subprocess.run(["/bin/true"])

if os.geteuid() == 0:
    os.setresuid(54321, 54321, 54321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if sys.argv[1] == "rank":
    run_as_rank(work)
sys.exit(reported(work))
"""


@pytest.mark.parametrize("what", ["thread", "process"])
@pytest.mark.parametrize("where", ["rank", "command"])
def test_where_no_thread_or_process_can_be_started_the_limit_is_named(
    where: str, what: str
) -> None:
    command = [sys.executable, "-c", WITHOUT_THREADS, where, what]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True)
    assert done.returncode == FAILED and done.stderr.count("\n") == 1, done.stderr
    assert " limit of threads and processes (ulimit -u: 1)" in done.stderr


def test_where_memory_has_no_room_for_a_threads_stack_that_limit_is_named() -> None:
    code = (
        "import resource, threading; from data.exits import reported; threading.stack_size(2**31); "
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); "
        "raise SystemExit(reported(threading.Thread(target=print).start))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True)
    assert done.returncode == FAILED and done.stderr.count("\n") == 1, done.stderr
    assert ": raise the limit of memory (ulimit -v: 2097152), that of threads " in done.stderr


def test_a_locale_that_torch_cannot_read_its_own_files_in_is_named(
    tmp_path: Path, tiny: Path
) -> None:
    command = [sys.executable, "-m", "trainer.train", str(tiny), "--run", str(tmp_path / "run")]
    env = {**ranks.environment(), **POSIX}
    done = subprocess.run(command, cwd=ranks.ROOT, env=env, capture_output=True, text=True)
    said = "torch reads files of its own in the locale's encoding, ascii: set PYTHONUTF8=1"
    # Where torch is a later one, it may read them in any.
    assert done.returncode == 0 or done.stderr.endswith(f"error: {said}\n"), done.stderr


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_save_and_leave(tmp_path: Path, tiny: Path) -> None:
    sets = ("training.images = 80000000", "intervals.keep = 2")
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "--", "trainer.train"]
    words = [str(tiny), "--run", str(tmp_path / "run"), *(w for s in sets for w in ("--set", s))]
    with (tmp_path / "out.txt").open("w") as out:
        torchrun = subprocess.Popen(
            [*command, *words], cwd=ranks.ROOT, env=ranks.environment(), stdout=out, stderr=out
        )
        checkpoints = tmp_path / "run" / "checkpoints"
        ranks.wait_for(checkpoints / f"{32:012d}")
        torchrun.kill()
        torchrun.wait()
    state = tmp_path / "run" / "launch" / "state.json"
    end = time.monotonic() + ranks.LIMIT
    while json.loads(state.read_text())["state"] == "running":
        assert time.monotonic() < end, (tmp_path / "out.txt").read_text()
        time.sleep(0.1)
    found = json.loads(state.read_text())
    assert found["state"] == "stopped", (tmp_path / "out.txt").read_text()
    assert found["checkpoint"] == f"{found['images_seen']:012d}"
