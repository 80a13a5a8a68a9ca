"""A signal that comes while a rank is being started, to the process that a user starts."""

import fcntl
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data.exits import REFUSED, TO_BE_CONTINUED
from tests.support import ranks
from trainer import evaluate, sample, train
from trainer.ranks.process import children, proc
from trainer.ranks.process_group import connected
from trainer.ranks.signals import Preemption
from trainer.ranks.world import join
from trainer.run.runstate import RunState

#: Tells on stdout that the trainer imports torch, and waits for a line on stdin.
_SITE = """\
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("importing", flush=True)
            sys.stdin.readline()

sys.meta_path.insert(0, Stop())
"""

LONG = ["--set", "training.images = 80000000", "--set", "intervals.checkpoint = 80000000"]


def signalled_in_import(
    run: Path, number: signal.Signals, *command: str, name: str = "torch"
) -> tuple[int, str]:
    """The status of a command that gets a signal as it imports `name`, and what it printed."""
    run.parent.mkdir(exist_ok=True)
    (run.parent / "sitecustomize.py").write_text(_SITE.replace('"torch"', repr(name)))
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ranks.ROOT, env=ranks.environment() | {"PYTHONPATH": str(run.parent)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(number)
    said = process.communicate("\n", timeout=ranks.LIMIT)[0]
    return process.returncode, said


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_torch_is_imported_stops_the_run_before_its_first_step(
    tmp_path: Path, tiny: Path, number: signal.Signals
) -> None:
    run = tmp_path / "own" / "run"
    words = ["trainer.train", str(tiny), "--run", str(run)]
    status, said = signalled_in_import(run, number, *words)
    assert status == TO_BE_CONTINUED, said
    assert said.endswith(
        "stopped by a signal before the first step; rerun the same command to resume\n"
    )
    assert not (run / "checkpoints").exists()
    job = ranks.start(tmp_path / "job", ranks=1, runs=[["train", str(tiny), "--run", str(run)]])
    said = job.wait()
    assert job.statuses == [0] and "finished" in said and "starts: denoise" in said, said


def train_with_operators_in(extensions: Path, directory: Path, words: list[str]) -> int:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    return ranks.work(directory, [["train", *words]], fp16=False)


def with_all_below(pid: int) -> list[int]:
    return [pid, *(n for child in children(pid) for n in with_all_below(child))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_ends_the_compiler_of_the_operator_too_stops_the_run(
    tmp_path: Path, tiny: Path, number: signal.Signals
) -> None:
    """A terminal gives Ctrl-C, and Slurm its signals, to all processes. One rank compiles."""
    words, operator = [str(tiny), "--run", str(tmp_path / "run")], tmp_path / "deepspeed_shm_comm"
    task = partial(train_with_operators_in, tmp_path, tmp_path, words)
    job = ranks.fork(tmp_path, task, ranks=2)
    processes: list[int] = []
    while [proc(pid, "comm").strip() for pid in processes].count("cc1plus") < 2:  # of two files
        assert not (operator / "deepspeed_shm_comm.so").exists()
        processes = [n for rank in job.ranks if rank.pid for n in with_all_below(rank.pid)]
    time.sleep(1.0)  # the other rank waits for this one's lock, or would compile in its place
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    said = job.wait()
    assert job.statuses == [TO_BE_CONTINUED], said
    assert said.endswith("before the first step; rerun the same command to resume\n"), said
    assert not (operator / "lock").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [("trainer.train", "torch"), ("data.pack", "numpy"), ("launch", "trainer.config.experiment")],
)
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_traceback(
    tmp_path: Path, command: str, name: str
) -> None:
    status, said = signalled_in_import(tmp_path / "run", signal.SIGINT, command, name=name)
    assert (status, said) == (-signal.SIGINT, "")


def meet_nobody() -> int:
    with Preemption(), connected(replace(join(), size=2), patience=ranks.LIMIT):
        return 0


def test_ctrl_c_while_the_ranks_meet_ends_the_process(tmp_path: Path) -> None:
    """Torch waits there for the others, and runs no handler of Python's."""
    job = ranks.fork(tmp_path, meet_nobody, ranks=1)
    caught, end = 0, time.monotonic() + ranks.LIMIT
    while not caught >> (signal.SIGTERM - 1) & 1 or caught >> (signal.SIGINT - 1) & 1:
        assert time.monotonic() < end, job.text
        time.sleep(0.05)
        status = Path(f"/proc/{job.ranks[0].pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    time.sleep(0.2)  # torch waits for rank 1
    job.signal(0, signal.SIGINT)
    job.wait()
    assert job.ranks[0].exitcode == -signal.SIGINT and job.text == ""


def test_a_closed_terminal_saves_the_run(tmp_path: Path, tiny: Path) -> None:
    """It sends HUP, and from then on nothing can be printed."""
    run, (ours, terminal) = tmp_path / "run", pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.train", str(tiny), "--run", str(run), *LONG],
        cwd=ranks.ROOT, env=ranks.environment(),
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    while b"images/s" not in (said := os.read(ours, 4096)):
        assert said
    os.close(ours)
    assert process.wait(timeout=ranks.LIMIT) == TO_BE_CONTINUED
    state = RunState.read(run)
    assert state is not None and (state.state, state.why) == ("stopped", "by a signal")
    assert state.checkpoint == f"{state.images_seen:012d}"


def work_with_few_files(main: Callable[[list[str]], int], words: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    return main(words)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["digits", "--run", "{here}/run"]),
        (sample.main, ["{here}/run", "--out", "{here}/few.npz"]),
        (evaluate.main, ["{here}/few.npz", "--reference", "{here}/few.npz", "--network", "none"]),
    ],
)
def test_work_with_too_few_open_files_is_refused_before_the_ranks_connect(
    main: Callable[[list[str]], int], words: list[str], tmp_path: Path
) -> None:
    """At 247 ranks the main rank would be full at the usual limit of 1024, hours into a queue."""
    given = [word.format(here=tmp_path) for word in words]
    job = ranks.fork(tmp_path / "job", partial(work_with_few_files, main, given), ranks=1)
    said = job.wait()
    assert job.ranks[0].exitcode == REFUSED
    assert "at most 256 files may be open" in said and "1 ranks need 604" in said
    assert not (tmp_path / "run").exists()
