"""One process at a time writes a run; real processes take it, hold it, lose it and die with it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.ranks import LIMIT
from trainer.ranks import process as processes
from trainer.ranks.process import Process
from trainer.run import lease
from trainer.run.directory import Run

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from trainer.run import lease
lease.BEAT = 0.2
held = lease.claim(Path(sys.argv[1]))
print("held", flush=True)
while True:
    time.sleep(0.1)
    held.check()
"""

LOOK_AS_ANOTHER_USER = """
import os, subprocess, sys
from pathlib import Path
from trainer.run import lease
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
os.setgroups([])
os.setegid(65534)
os.seteuid(65534)
print(lease.live_holder(Path(sys.argv[1])))
"""


def hold(run: Path, *, job: str | None = None, start: int = 0) -> "subprocess.Popen[str]":
    """A process that holds the run until it is killed, or loses it."""
    slurm = {} if job is None else {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(start)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        cwd=ROOT, env={"PATH": "/bin", **slurm}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_live_writer_is_not_disturbed(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is writing"):
        lease.claim(tmp_path)
    assert holder.poll() is None
    kill(holder)


def test_a_live_writer_is_seen_by_a_user_to_whom_its_process_is_hidden() -> None:
    """hidepid of /proc: a colleague's start would take the run over."""
    look = ["unshare", "--mount", sys.executable, "-c", LOOK_AS_ANOTHER_USER]
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("root alone can mount /proc so, and be another user")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        holder = hold(Path(place))
        for said in (f"process {holder.pid} on {socket.gethostname()}", "None"):
            found = subprocess.run([*look, place], cwd=ROOT, capture_output=True, text=True)
            assert found.stdout.strip() == said, found.stderr
            kill(holder)


def test_a_machine_without_a_name_of_its_start_has_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a sandbox, whose /proc lacks most of /proc/sys."""
    monkeypatch.setattr(processes, "_BOOT", tmp_path / "boot_id")
    named = processes.machine()
    assert socket.gethostname() in named and named == processes.machine()
    assert not Process.here().has_ended()


def test_a_dead_writer_is_followed_at_once(tmp_path: Path) -> None:
    kill(hold(tmp_path))
    kill(hold(tmp_path, job="7"))
    lease.claim(tmp_path).release()
    assert lease.holder(tmp_path) is None


def test_the_wait_for_a_dead_writer_of_another_machine_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog of a start with a shorter patience would take it for a rank that hangs."""
    kill(hold(tmp_path, job="7"))
    file, marks = tmp_path / "launch" / "writer.json", list[str]()
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": "another"}))
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    lease.claim(tmp_path, mark=marks.append).release()
    assert len(marks) > 2 and marks[0].startswith("waiting for a sign of life of job 7 on ")


def test_the_same_job_started_again_takes_over_and_the_old_start_loses(tmp_path: Path) -> None:
    old = hold(tmp_path, job="7", start=0)
    new = hold(tmp_path, job="7", start=1)
    said = old.communicate(timeout=LIMIT)[1]
    assert (
        f"LeaseLost: job 7 on {lease.Holder.here(tmp_path).host} has taken over {tmp_path}" in said
    )
    assert new.poll() is None
    kill(new)


def test_a_start_follows_an_earlier_one_of_its_job_alone(tmp_path: Path) -> None:
    old = replace(lease.Holder.here(tmp_path), job="7", start=1)
    for job, start, follows in (("7", 2, True), ("7", 1, False), ("8", 2, False)):
        assert old.is_followed_by(replace(old, job=job, start=start)) is follows


def test_who_has_lost_a_run_leaves_it_to_its_successor_at_the_end(tmp_path: Path) -> None:
    held = lease.claim(tmp_path)
    successor = replace(lease.Holder.here(tmp_path), token="another")
    lease._write(tmp_path, successor)
    held.release()
    assert lease.holder(tmp_path) == successor


def test_a_request_to_stop_reaches_the_writer(tmp_path: Path) -> None:
    held = lease.claim(tmp_path)
    assert not held.stop_requested
    held.release()
    lease.request_stop(tmp_path)
    again = lease.claim(tmp_path)
    assert again.stop_requested
    again.release()


@pytest.mark.parametrize(("job", "is_own"), [("7", True), ("8", False)])
def test_ranks_of_one_job_that_come_up_as_two_worlds_are_told_so(
    job: str, is_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `srun torchrun --standalone` on two nodes: half of the ranks would train alone."""
    holder = hold(tmp_path, job="7")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    with pytest.raises(ValueError, match=r"job 7 on .* is writing") as error:
        lease.claim(tmp_path)
    assert ("launchers of this job did not find each other" in f"{error.value}") == is_own
    kill(holder)


def test_a_copy_of_a_run_that_is_being_written_is_free_at_once(tmp_path: Path) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    (original / "launch").mkdir(parents=True)
    holder = hold(original)
    shutil.copytree(original, copy)
    assert lease.holder(copy) is None
    lease.claim(copy).release()
    with pytest.raises(ValueError, match="is writing"):
        lease.claim(original)
    kill(holder)


def test_a_writer_of_the_last_release_keeps_its_run(tmp_path: Path) -> None:
    file = tmp_path / "launch" / "writer.json"
    holder = hold(tmp_path)
    found = json.loads(file.read_text())
    found.pop("run", None)
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is writing"):
        lease.claim(tmp_path)
    kill(holder)


@pytest.mark.parametrize("content", [None, "", "[3]", '{"token": 5}', '{"writer": "other"}'])
def test_a_file_that_is_missing_or_foreign_for_a_moment_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(lease, "MOMENT", 0.3)
    file = tmp_path / "launch" / "writer.json"
    with Run(tmp_path).claimed() as run:
        before = file.read_text()
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        run.check_lease()
        assert file.read_text() == before
        run.log("still writing")
    assert not file.exists()


def test_two_threads_that_find_the_file_missing_write_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MOMENT", 0.1)
    fsync = os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        other.start()
        other.join(0.5)
        fsync(descriptor)

    with Run(tmp_path).claimed() as run:
        other = threading.Thread(target=run.check_lease)  # as the records of a run do
        (tmp_path / "launch" / "writer.json").unlink()
        monkeypatch.setattr(os, "fsync", meanwhile)
        run.check_lease()
        other.join()


@pytest.mark.parametrize("content", ["", "[3]", '{"token": 5}', "\x00"])
def test_a_foreign_file_does_not_block_a_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "writer.json").write_text(content)
    lease.claim(tmp_path).release()


def test_a_start_that_came_and_went_is_no_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MOMENT", 0.3)
    old = Run(tmp_path).claimed()
    run = old.__enter__()
    (tmp_path / "launch" / "writer.json").unlink()
    with Run(tmp_path).claimed():
        pass
    with pytest.raises(lease.LeaseLost, match="another start has written"):
        run.check_lease()


def test_a_run_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = r"run is gone: it was moved or removed"
    with pytest.raises(lease.LeaseLost, match=gone), Run(tmp_path / "run").claimed() as run:
        shutil.rmtree(tmp_path / "run")
        run.log("hello")
        with pytest.raises(lease.LeaseLost, match=gone):
            run.settle()
