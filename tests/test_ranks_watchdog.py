"""A hung rank ends the job and is named with what it was doing; a refused run leaves no thread."""

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data import files
from data.exits import FAILED
from tests.support import ranks
from trainer.ranks import process as processes
from trainer.ranks.faults import Refused
from trainer.ranks.process_group import connected
from trainer.ranks.watchdog import Watchdog, compiles
from trainer.ranks.world import join
from trainer.watch import forensics

PATIENCE = 10.0


def stranger(address: tuple[str, int]) -> None:
    """Write to the store of the ranks what they must not believe, and bytes that are no message."""
    store = dist.TCPStore(*address, is_master=False)
    for name in ("verdict", "rank 0", "rank 1"):
        for key in (name, f"watch/{name}", f"default_pg/0/watch/{name}", f"0/watch/{name}"):
            for message in ("lost: n1", '["lost"]', "\x00\xff", f"{'0' * 64} [1, 2, 3]"):
                store.set(key, message)
    with socket.create_connection(address) as raw:
        raw.sendall(b"\x00\xff" * 512)


def go_on_among_strangers() -> int:
    """Ranks that are sound, for some beats, while somebody writes to their store."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=ranks.LIMIT) as watchdog:
        for _ in range(4):
            if world.is_main:
                stranger((world.address, world.port))
            watchdog.mark("computing")
            dist.barrier()
            time.sleep(1.0)
        return 0 if all(thread.is_alive() for thread in watchdog._threads) else 1


def test_the_watch_believes_nobody_but_its_ranks(jobs: dict[str, ranks.Job]) -> None:
    job = jobs["strangers"]
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text


def stop_in_mid_run(number: signal.Signals) -> int:
    """Three ranks, of which the main one is killed or stopped as the others wait for it."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=PATIENCE) as watchdog:
        watchdog.mark("computing")
        if world.is_main:
            time.sleep(2.0)
            os.kill(os.getpid(), number)
        dist.barrier()
    return 0


@pytest.mark.parametrize("name", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_the_lowest_rank_that_lives_names_the_main_rank_before_any_other_error(
    jobs: dict[str, ranks.Job], name: str
) -> None:
    job = jobs[name]
    for process in job.ranks[1:]:
        process.join(ranks.LIMIT)
    job.kill()
    assert [process.exitcode for process in job.ranks[1:]] == [FAILED, FAILED], job.text
    first = next(line for line in job.texts[1].splitlines() if not line.startswith("DeepSpeed"))
    assert re.fullmatch(r"\S+: lost: \S+ \(rank 0; [^)]*\): .*", first), job.text
    assert "Traceback" not in job.text


def lose(killed: int, told: Path) -> int:
    """Two machines of two ranks, which see none of the other's processes. One rank is killed."""
    world = replace(join(), local_rank=int(os.environ["RANK"]) % 2, local_size=2)
    processes.machine = lambda: f"machine {world.rank // 2}"
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=ranks.LIMIT) as watchdog:
        watchdog.tell = lambda line: files.append(told, f"{line}\n")
        watchdog.mark("computing")
        if world.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(8))
    return 0


@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_only_loses_its_connection_is_not_named_as_the_fault(
    jobs: dict[str, ranks.Job], killed: int
) -> None:
    """Its host would be excluded, or its error noted in place of what the main rank has found."""
    job = jobs[f"lost {killed}"]
    job.wait()
    assert sorted(p.exitcode or 0 for p in job.ranks) == [-signal.SIGKILL, *3 * [FAILED]]
    said = (job.directory / "told").read_text().splitlines()
    lost = rf"\S+: lost: \S+ \(rank {killed}(; [^)]*)?\): ended"
    assert said and all(re.fullmatch(lost, line) for line in said), job.text


def lose_the_network(told: Path) -> int:
    """Rank 1 ends by a connection's error, and no rank is lost."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=ranks.LIMIT) as watchdog:
        watchdog.tell = lambda line: files.append(told, f"{line}\n")
        if world.rank == 1:
            raise RuntimeError("[/gloo/transport] no route to host")
        dist.all_reduce(torch.zeros(8))
    return 0


def test_the_error_of_a_connection_is_logged_where_no_rank_is_lost(
    jobs: dict[str, ranks.Job],
) -> None:
    job = jobs["cut"]
    job.wait()
    told = job.directory / "told"
    said = told.read_text() if told.exists() else ""
    failed = r"\S+: failed: \S+ \(rank 1; \w+\): .* no route to host\n"
    assert re.fullmatch(failed, said), f"{said}\n{job.texts}"


def form_a_group() -> int:
    """The main rank waits in the store for rank 1, which sees it report meanwhile."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=ranks.LIMIT) as watchdog:
        heard = set()
        if not world.is_main:
            end = time.monotonic() + 3 * PATIENCE
            while len(heard) < 4 and time.monotonic() < end:
                heard.add(str(watchdog._mailbox.get(["rank 0"])))
                time.sleep(0.1)
        dist.new_group(backend="gloo")
        return 0 if world.is_main or len(heard) == 4 else 1


def test_a_rank_that_waits_for_others_in_the_store_is_heard(jobs: dict[str, ranks.Job]) -> None:
    job = jobs["forming"]
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text


def stand_still(directory: Path) -> int:
    """Three steps of two ranks, of which rank 1 does not come back from the third."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=PATIENCE) as watchdog:
        watchdog.dump = partial(forensics.dump, directory, rank=world.rank)
        for step in range(3):
            watchdog.mark("waiting for data")
            if step == 2 and world.rank == 1:
                signal.pause()
            watchdog.mark("computing")
            dist.barrier()
    return 0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ranks.Job]]:
    """Jobs that mostly wait, so they run beside each other."""
    root = tmp_path_factory.mktemp("jobs")
    tasks: dict[str, tuple[int, Callable[[], int]]] = {
        "hung": (2, partial(stand_still, root / "hung")),
        "killed": (3, partial(stop_in_mid_run, signal.SIGKILL)),
        "stopped": (3, partial(stop_in_mid_run, signal.SIGSTOP)),
        "cut": (2, partial(lose_the_network, root / "cut" / "told")),
        "lost 0": (4, partial(lose, 0, root / "lost 0" / "told")),
        "lost 2": (4, partial(lose, 2, root / "lost 2" / "told")),
        "strangers": (2, go_on_among_strangers),
        "forming": (2, form_a_group),
        "refused": (1, refuse),
    }
    started = {name: ranks.fork(root / name, task, ranks=n) for name, (n, task) in tasks.items()}
    yield started
    for job in started.values():
        job.kill()


@pytest.mark.slow
def test_a_hung_rank_is_named_by_all(jobs: dict[str, ranks.Job]) -> None:
    job = jobs["hung"]
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    said = rf"hung: \S+ \(rank 1; waiting for data\): no rank made progress for {PATIENCE:g} s"
    assert re.search(said, job.text), job.text
    # Where each of them stood, and that rank 1 has not come to the last barrier.
    assert "in stand_still" in (job.directory / "stacks_rank_1").read_text()
    assert "in barrier" in (job.directory / "stacks_rank_0").read_text()
    traces = [(job.directory / f"fr_trace_rank_{rank}").read_bytes() for rank in (0, 1)]
    barriers = [
        sum(entry["profiling_name"] == "gloo:barrier" for entry in pickle.loads(trace)["entries"])
        for trace in traces
    ]
    assert barriers[0] == barriers[1] + 1


class SlowStore:
    """A store that answers after a second, as on a busy machine."""

    def __init__(self, store: dist.Store) -> None:
        self.set, self.check = store.set, store.check
        self._store = store

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(1.0)
        return self._store.multi_get(keys)


def refuse() -> int:
    """A run that is refused while the watchdog's thread waits for the store."""
    with connected(world := join(), patience=ranks.LIMIT):
        before = threading.enumerate()
        try:
            with Watchdog(world, patience=PATIENCE) as watchdog:
                watchdog._mailbox._store = SlowStore(watchdog._mailbox._store)
                time.sleep(1.5)
                raise Refused("no shards")
        except Refused:
            return len(set(threading.enumerate()) - set(before))


def test_no_thread_is_in_the_store_when_a_refused_run_exits(jobs: dict[str, ranks.Job]) -> None:
    job = jobs["refused"]
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0], job.text


def test_a_compiler_below_a_process_is_seen(tmp_path: Path) -> None:
    """A script by the name of a compiler, and below a shell, as ninja runs it."""
    assert not compiles()
    compiler = tmp_path / "nvcc"
    shutil.copy("/bin/sleep", compiler)
    with subprocess.Popen(["/bin/sh", "-c", f"{compiler} 60; true"]) as shell:
        end = time.monotonic() + ranks.LIMIT
        while not compiles():
            assert time.monotonic() < end
        (child,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
    assert not compiles()


def compile_slowly(compiler: Path) -> int:
    """Rank 1 compiles for twice the patience of the watchdog; the main rank forms a group."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=PATIENCE):
        if world.rank == 1:
            subprocess.run([compiler, str(2 * PATIENCE)], check=True)
        dist.new_group(backend="gloo")
    return 0


@pytest.mark.slow
def test_a_compilation_longer_than_the_patience_is_not_ended(tmp_path: Path) -> None:
    compiler = Path(shutil.copy("/bin/sleep", tmp_path / "cicc"))
    job = ranks.fork(tmp_path, partial(compile_slowly, compiler), ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text
