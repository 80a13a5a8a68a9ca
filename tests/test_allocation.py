"""The check of an allocation names the odd rank: in code, versions, GPUs, clock, disk or access."""

import dataclasses
import os
import re
import resource
import shutil
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.exits import FAILED, REFUSED
from launch import __main__ as launch
from tests.support import faults, ranks
from trainer import allocation
from trainer.planning.facts import Facts, problems, speed, table

GOOD = Facts(
    rank=0,
    host="n1",
    code="c0ffee",
    versions="torch 2.13.0",
    gpus="8 x H100",
    free_gib=100.0,
    lookup=0.001,
    access="",
)
LOOKUPS = (
    "and torch makes one for each connection: correct /etc/resolv.conf, or add the nodes to "
    "/etc/hosts"
)
RANKS = [dataclasses.replace(GOOD, rank=rank, host=f"n{rank}") for rank in range(4)]


def with_one(**changes: object) -> list[Facts]:
    """Four ranks, of which number 2 is another one."""
    odd = dataclasses.replace(RANKS[2], **changes)  # type: ignore[arg-type]
    return [*RANKS[:2], odd, RANKS[3]]


def clocks(skew: float = 0.0) -> dict[int, tuple[float, float]]:
    return {0: (0.0, 0.0), 1: (0.3, 0.3), 2: (skew, skew), 3: (0.0, 0.0)}


def test_a_good_allocation_has_no_problems() -> None:
    assert problems(RANKS, clocks=clocks()) == {}


def test_the_odd_rank_is_named_with_what_is_odd() -> None:
    for change, said in (
        ({"code": "bad"}, "code: bad, elsewhere c0ffee"),
        ({"versions": "torch 2.6.0"}, "versions: torch 2.6.0, elsewhere torch 2.13.0"),
        ({"gpus": "7 x H100"}, "gpus: 7 x H100, elsewhere 8 x H100"),
        ({"free_gib": 3.0}, "3.0 GiB of disk free"),
        ({"access": "OSError: no shards"}, "OSError: no shards"),
        ({"device": "n2 shows 0 GPUs"}, "n2 shows 0 GPUs"),
        ({"lookup": 5.0}, f"a look-up of an address takes 5.0 s, {LOOKUPS}"),
    ):
        assert problems(with_one(**change), clocks=clocks()) == {2: said}
    assert problems(RANKS, clocks=clocks(skew=-7.0)) == {2: "clock is off by -7.0 s"}
    assert problems(RANKS, clocks=clocks(skew=2.5)) == {2: "clock is off by +2.5 s"}


class LateStore(dist.TCPStore):
    """Of a busy machine: a rank that waits for the main rank goes on seconds after it has come."""

    def get(self, key: str) -> bytes:
        found = super().get(key)
        time.sleep(0.0 if key[-1].isdigit() else 3.0)
        return found


def check_with(*, late: int, ahead: int) -> int:
    """One rank of this number is on a busy machine, the clock of another is a minute ahead."""
    rank, now = int(os.environ["RANK"]), time.time
    if rank == late:
        dist.TCPStore = LateStore  # type: ignore[misc]
    if rank == ahead:
        time.time = lambda: now() + 60.0
    return allocation.main(["--free", "0"])


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_on_a_busy_machine_has_no_wrong_clock(late: int, tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(check_with, late=late, ahead=2), ranks=4)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED] * 4, job.text
    off = re.findall(r"^ +(\d) .*clock is off by \+(\S+) s$", said, re.MULTILINE)
    assert [rank for rank, _ in off] == ["2"] and 55 < float(off[0][1]) < 61, said


def check_alone(directory: Path, words: list[str], *, status: int = FAILED) -> str:
    job = ranks.fork(directory, partial(allocation.main, words), ranks=1)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [status], job.text
    return said


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_directory_that_is_not_there_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    """It was an error of Python's about a file inside, and a disk without space."""
    (tmp_path / "file").touch()
    place = tmp_path / name
    run, data = ["--run", str(place), "--free", "0.001"], ["--data", str(place), "--free", "0"]
    said = check_alone(tmp_path / "job", run)
    assert f"--run {place}: no directory here: make it, or mount its disk on this node\n" in said
    assert "Error" not in said and "of disk free" not in said
    missing = f"--data {place}: no manifest.json: mount its disk here, or run data.pack"
    assert missing in check_alone(tmp_path / "job", data)


def test_tars_that_are_not_of_the_dataset_are_named_and_no_fault(
    tmp_path: Path, digits: Path
) -> None:
    for name in ("plain", "more"):
        shutil.copytree(digits, tmp_path / name)
    (tmp_path / "more" / "zz.tar").touch()
    (tmp_path / "more" / "._00000.tar").touch()  # of macOS
    for name in ("plain", "more"):
        words = ["--data", str(tmp_path / name), "--free", "0"]
        said = check_alone(tmp_path / f"job-{name}", words, status=0)
        line = f"{tmp_path}/more: 1 tar is not in manifest.json and not read, such as zz.tar; to "
        assert (line in said) is ("more" in said) is (name == "more")


def test_the_bandwidth_is_that_of_each_rank_in_a_ring() -> None:
    said = "all-reduce of 4 ranks: 2.00 ms, 0.75 GiB/s"
    assert speed(64, 0.002, 0.125, ranks=4) == said  # sends 96 MiB of the 64


def test_the_table_has_a_row_for_each_rank_and_for_who_did_not_answer() -> None:
    wrong = problems(with_one(gpus="none"), clocks=clocks())
    rows = table(RANKS, wrong=wrong, missing={4: "n4"}).splitlines()
    assert len(rows) == 6
    assert rows[1].endswith("ok") and rows[3].endswith("elsewhere 8 x H100")
    assert "n4" in rows[5] and rows[5].endswith("no answer")


def test_nodes_that_show_fewer_gpus_than_the_job_needs_are_bad(tmp_path: Path) -> None:
    """All alike, so that none is the odd one."""
    check = partial(allocation.main, ["--gpus", "2", "--free", "0"])
    job = ranks.fork(tmp_path, check, ranks=2)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [REFUSED, REFUSED], job.text
    assert f"bad nodes: {socket.gethostname()}" in said and "ready" not in said
    assert said.count("shows 0 GPUs, and the job needs 2") == 2


def test_the_ranks_of_deepspeed_check_too(tmp_path: Path) -> None:
    """It puts an option of its own ahead of the verb."""
    words = ["--local_rank=0", "check", "--gpus", "0", "--free", "0"]
    job = ranks.fork(tmp_path, partial(launch.main, words), ranks=2)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text
    assert "all nodes are ready" in said


def check_with_a_broken_gpu() -> int:
    if os.environ["RANK"] == "1":
        faults.fail_the_gpu(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    return allocation.main(["--free", "0"])


def test_a_gpu_that_does_not_answer_is_named(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, check_with_a_broken_gpu, ranks=3)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [REFUSED] * 3, job.text
    host = socket.gethostname()
    row = f"a GPU of {host} fails: CUDA error: unspecified launch failure"
    assert said.count(row) == 1 and f"bad nodes: {host}" in said and "ready" not in said


@pytest.mark.parametrize(("option", "value"), [("--seconds", "-5"), ("--free", "nan")])
def test_a_value_that_means_nothing_is_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} = {float(value)}: must be "):
        allocation.main([option, value])


def check_with_few_files() -> int:
    """Where few more files may be open, unless the process asks for more, which it may."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 6, 4096))
    return allocation.main(["--ranks", "3"])


def test_a_soft_limit_of_open_files_is_no_fault_of_an_allocation(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, check_with_few_files, ranks=3)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [0] * 3, said
