"""How the ranks come and leave together."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from data.exits import FAILED, REFUSED
from tests.support import ranks
from tests.support.cluster import wait_until
from tests.support.runs import END, HALF, Place
from trainer import sample
from trainer.ranks import connections, meeting, watchdog
from trainer.ranks.group import all_come
from trainer.ranks.process_group import connected
from trainer.ranks.world import World, join


def meet_as(variable: str, value: str) -> int:
    if os.environ["RANK"] == "2":
        os.environ[variable] = value
    with connected(join(), patience=ranks.LIMIT):
        return 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("RANK", "3", "rank 3 of 3 on {0}"),
        ("RANK", "1", "rank 1 of 3 on {0}, rank 1 of 3 on {0}"),
        ("WORLD_SIZE", "4", "rank 2 of 4 on {0}"),
    ],
)
def test_a_process_with_the_number_of_no_rank_ends_all_at_once(
    variable: str, value: str, said: str, tmp_path: Path
) -> None:
    job = ranks.fork(tmp_path, partial(meet_as, variable, value), ranks=3)
    line = f"error: the ranks of a job of 3 came up as {said.format(socket.gethostname())}: start "
    assert job.wait().startswith(line), job.text
    assert [process.exitcode for process in job.ranks] == [REFUSED] * 3
    assert job.text.count("error: ") == 1


def fail_alone() -> int:
    """The main rank waits for rank 1 in the store, which an error of that one does not end."""
    watchdog._GRACE = watchdog._BEAT = 0.2
    world = join()
    with connected(world, patience=ranks.LIMIT), watchdog.Watchdog(world, patience=ranks.LIMIT):
        assert all_come()
        if not world.is_main and not all_come(within=0.1):
            raise ValueError("refused here alone")
        dist.new_group()
    return 0


def test_the_error_of_one_rank_ends_those_that_wait_for_it_in_the_store(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, fail_alone, ranks=2)
    said = job.wait()
    host = socket.gethostname()
    assert said == f"{host}: failed: {host} (rank 1; starting): ValueError: refused here alone\n"
    assert [process.exitcode for process in job.ranks] == [FAILED, REFUSED]


def meet_on(interfaces: str) -> int:
    os.environ["GLOO_SOCKET_IFNAME"] = interfaces
    with connected(join(), patience=ranks.LIMIT):
        return 0


def test_a_network_interface_that_no_machine_has_is_one_line(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(meet_on, "lo,eth99"), ranks=2)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [REFUSED] * 2, said
    assert said.count("'eth99'") == 1 and "has no such network interface; it has: lo" in said
    assert "Traceback" not in said


def keep_idle_connections() -> int:
    connections._EVERY, before = 0.1, set(threading.enumerate())
    with connected(join(), patience=ranks.LIMIT):
        groups = [dist.new_group(), dist.new_group()]  # as DeepSpeed makes them, and NCCL later
        wait_until(lambda: set(timers()) == {"02"}, "a timer of keepalive on each connection")
        print(f"{len(timers())} connections", flush=True)
        for group in groups:
            dist.barrier(group)
    return len(set(threading.enumerate()) - before)


def timers() -> list[str]:
    """The kernel's timers of this process's TCP connections: 00 is none, 02 that of keepalive."""
    own = {link.resolve().name for link in Path("/proc/self/fd").iterdir()}
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    return [row[5][:2] for row in rows if row[3] == "01" and f"socket:[{row[9]}]" in own]


def test_no_connection_is_idle_for_so_long_that_a_firewall_forgets_it(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, keep_idle_connections, ranks=2)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], said
    assert int(re.findall(r"^(\d+) connections$", said, re.MULTILINE)[0]) >= 5


def test_one_dead_address_of_two_of_the_main_rank_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch tries the addresses one after the other, and takes two minutes for one that is dead."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(meeting, "_TELL", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as main_rank:
        port = main_rank.getsockname()[1]
        both = [each for n in (2, 1) for each in resolve(f"127.0.0.{n}", port, type=1)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
        with meeting._missing_named(World(rank=1, size=2, address="n1", port=port)):
            time.sleep(1.0)
    me, where = socket.gethostname(), f"n1:{port}, address 127.0.0.2"
    said = capsys.readouterr().out.splitlines()
    why = f"nothing answers at {where} (MASTER_ADDR, MASTER_PORT): Connection refused"
    assert set(said) == {f"{me} waits for rank 0: {why}"}


def train_on_unequal_nodes(directory: Path, arguments: list) -> int:
    """A rank of one node with two ranks, or of two with one each."""
    if os.environ["RANK"] in "01":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    else:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return ranks.work(directory, [arguments], fp16=False, patience=60.0)


def test_nodes_of_unequal_numbers_of_ranks_save_together(place: Place) -> None:
    """As those of `srun -N3 -n4`, or of torchrun with a rank for each GPU. They hung there."""
    run = place.run("unequal")
    widths = ("training.ema_widths = [0.05, 0.1]", f"intervals.averages = {HALF}")
    task = partial(train_on_unequal_nodes, place.root, place.arguments("unequal", sets=widths))
    job = ranks.fork(place.root / "unequal-job", task, ranks=4)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [0] * 4, said
    for written in ("checkpoints", "averages"):
        assert sorted(p.name for p in (run / written).iterdir()) == [f"{HALF:012d}", f"{END:012d}"]


def test_a_user_error_ends_every_rank_with_its_status(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    ask = [*weights["unet"], "--classes", "99", "--out", str(tmp_path / "a.npz")]
    job = ranks.fork(tmp_path, partial(sample.main, ask), ranks=2)
    job.wait()
    # With the group left open, the threads of torch aborted most processes here.
    assert [process.exitcode for process in job.ranks] == [REFUSED] * 2, job.text
    assert job.texts == ["error: --classes: 99 is not among the classes 0 to 9\n", ""]


ENDS = """
import os, threading, torch
from trainer.ranks.ending import run_as_rank

def free():  # as torch's threads do once a collective is over
    while True:
        torch.ones(8)

def main():
    threading.Thread(target=free, daemon=True).start()
    return 75

children = []
while len(children) < 8:
    if not (child := os.fork()):
        run_as_rank(main)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_thread_of_torch_that_works_until_the_end_does_not_abort_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=ranks.ROOT, capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == (f"{[75] * 8}\n", "")


def test_a_letter_that_the_terminal_has_no_code_for_does_not_end_a_rank() -> None:
    script = (
        "from trainer.ranks.ending import run_as_rank; run_as_rank(lambda: print('läuft') or 75)"
    )
    env = {**ranks.environment(), "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", script], cwd=ranks.ROOT, env=env, capture_output=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, b"l\\xe4uft\n", b"")
