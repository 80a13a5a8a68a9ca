"""Machines without a scheduler: each launcher trains the same run; lost and hung ranks are named.

mpirun is Open MPI 5 from PyPI, the one that the environment's mpi4py is linked with.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cluster import LIMIT, wait_until
from tests.support.site import ENDLESS, Site

pytestmark = pytest.mark.timeout(4 * LIMIT)
LAUNCHERS = ("mpirun", "deepspeed", "torchrun")
# Seconds that a rank may be silent in these tests: the first ones in which this machine can start.
PATIENCES = (15, 60, 240)


def start(
    site: Site, name: str, launcher: str, *changes: str, setup: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """Start a run on both machines from the first one, in a session of its own."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    words = site.start(name, site.settings(launcher, setup=setup), *changes)
    env = [f"{key}={value}" for key, value in root.items()]
    return site.cluster.start("n1", "setsid", "--wait", "env", *env, *words)


@contextmanager
def renamed(site: Site, prefix: str) -> Iterator[None]:
    """While entered, the machines call themselves by names that no other machine can resolve."""
    for host in site.cluster.names:
        site.cluster.run(host, "hostname", f"{prefix}{host}")
    try:
        yield
    finally:
        for host in site.cluster.names:
            site.cluster.run(host, "hostname", host)


def test_every_launcher_trains_the_same_run(site: Site) -> None:
    losses = {}
    for launcher in LAUNCHERS:
        # torchrun asks each machine for its own name, unless it is told one (pytorch#150532).
        prefix = "odd-" if launcher == "torchrun" else ""
        reached = site.cluster.home / f"reached-{launcher}"
        with renamed(site, prefix):
            job = start(site, launcher, launcher, setup=[f"hostname >> {reached}"])
            output = job.communicate(timeout=LIMIT)[0]
        assert job.returncode == 0, output[-4000:]
        assert "4 ranks" in site.log(launcher)
        assert set(reached.read_text().split()) == {f"{prefix}n1", f"{prefix}n2"}
        losses[launcher] = site.losses(launcher)
    assert len(losses["mpirun"]) == 8
    assert losses["mpirun"] == losses["deepspeed"] == losses["torchrun"]


#: Preloaded, it lets a program and those that it starts see another time.
BEHIND = """
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *time) {
  int status = syscall(SYS_clock_gettime, clock, time);
  if (clock == CLOCK_REALTIME) time->tv_sec -= 30;
  return status;
}
"""


def test_a_machine_whose_clock_is_behind_is_named_before_torchrun_takes_it_for_lost(
    site: Site,
) -> None:
    """Its ranks would come up as two jobs, or wait for minutes at the end and after each loss."""
    source, library = site.cluster.home / "behind.c", site.cluster.home / "behind.so"
    source.write_text(BEHIND)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    late = f'[ "$(hostname)" != n2 ] || export LD_PRELOAD={library}'
    job = start(site, "late", "torchrun", setup=[late, "echo the setup says something"])
    output = job.communicate(timeout=LIMIT)[0]
    assert job.returncode == 78, output
    assert re.search("error: n1: the clock of n2 is (28|29|30|31) s behind that of n1, and", output)
    assert not site.log("late")


def last_word(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2]


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_a_closed_terminal_saves_the_run(site: Site, launcher: str) -> None:
    name = f"hung-up-{launcher}"
    job = start(site, name, launcher, ENDLESS)
    site.wait_start(name, 0)
    script = str(site.run(name) / "launch" / "job.sh")
    shell = next(p for p in site.cluster.pids("n1", ["bash", script]) if last_word(p) == script)
    assert job.stdout is not None
    job.stdout.close()
    os.killpg(shell, signal.SIGHUP)
    job.wait(timeout=LIMIT)
    recorded = site.recorded(name)
    assert (recorded.state, recorded.why) == ("stopped", "by `python -m launch stop`")
    assert recorded.checkpoint == f"{site.rows(name)[-1]['images']:012d}"
    for host in ("n1", "n2"):
        assert not site.cluster.pids(host, ["-m trainer.train", name])


def start_bare(site: Site, name: str) -> "tuple[list[subprocess.Popen[str]], int]":
    """Four ranks on two machines that train with no launcher at all, and how patient they are.

    Nothing but themselves ends them.
    """
    for patience in PATIENCES:
        jobs = ranks_of(site, name, patience)
        wait_until(
            lambda jobs=jobs: site.recorded(name).images_seen >= 40 or has_ended(jobs),
            f"steps of {name}",
        )
        if not has_ended(jobs):
            return jobs, patience
        texts = "\n".join(end(jobs))
        assert "no rank made progress" in texts, texts
    raise AssertionError(f"no step in {PATIENCES[-1]} s\n{site.log(name)}")


def has_ended(jobs: "list[subprocess.Popen[str]]") -> bool:
    return any(job.poll() is not None for job in jobs)


def ranks_of(site: Site, name: str, patience: int) -> "list[subprocess.Popen[str]]":
    jobs = []
    for rank in range(4):
        world = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}
        meeting = {"MASTER_ADDR": "n1", "MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": "eth0"}
        env = [f"{key}={value}" for key, value in {**world, **meeting}.items()]
        train = [sys.executable, "-m", "trainer.train", site.preset, "--run", site.run(name)]
        words = ["env", *env, *train, "--patience", patience, "--set", ENDLESS]
        jobs.append(site.cluster.start(f"n{1 + rank // 2}", *words))
    return jobs


def end(jobs: "list[subprocess.Popen[str]]") -> list[str]:
    """What each rank printed; all must end by themselves."""
    texts = [job.communicate(timeout=LIMIT)[0] for job in jobs]
    assert all(job.returncode == 1 for job in jobs), (texts, [job.returncode for job in jobs])
    return texts


def test_a_cut_off_machine_ends_the_job_and_is_named(site: Site) -> None:
    jobs, patience = start_bare(site, "cut")
    site.cluster.cut("n2")
    try:
        texts = end(jobs)
    finally:
        site.cluster.heal("n2")
    lost = rf"n1: lost: n2 \(ranks 2, 3; .*\): not heard from for {patience} s"
    assert re.search(lost, texts[0])
    assert re.search(lost, site.log("cut"))
    assert site.recorded("cut").state == "failed"
    assert re.search(r"n2: lost: n1 \(rank 0; .*\)", texts[2])


def test_a_network_that_drops_large_packets_is_found_before_the_first_step(site: Site) -> None:
    """The bridge takes 1,500 bytes. A kernel that cuts packets late would pass larger ones."""
    interface = ("ip", "link", "set", "eth0")
    for host in site.cluster.names:
        site.cluster.run(host, *interface, "mtu", 9000, "gso_max_segs", 1)
    try:
        texts = end(ranks_of(site, "packets", 15))
    finally:
        for host in site.cluster.names:
            site.cluster.run(host, *interface, "mtu", 1500, "gso_max_segs", 65535)
    assert all("the ranks reach each other, but 16 KiB do not arrive" in text for text in texts)


def test_a_main_rank_that_says_nothing_ends_the_job_and_is_named(site: Site) -> None:
    (main, *others), _ = start_bare(site, "silent")
    for pid in site.cluster.pids("n1", [str(site.run("silent"))]):
        if "\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_text():
            os.kill(pid, signal.SIGSTOP)
            stopped = pid
    try:
        texts = end(others)
    finally:
        os.kill(stopped, signal.SIGKILL)
        main.send_signal(signal.SIGCONT)  # nsenter stopped itself along with its child
        main.communicate(timeout=LIMIT)
    assert re.search(r"lost: n1 \(rank 0; ", "\n".join(texts) + site.log("silent"))


def test_check_names_the_bad_node(site: Site) -> None:
    srun = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, "-m", "launch", "check"]
    words = [*srun, "--free", "0", "--seconds", f"{LIMIT:g}"]
    good = site.cluster.run("ctl", *words, "--data", site.preset.parent / "digits")
    assert "all nodes are ready" in good and "all-reduce of 4 ranks" in good
    # Here n1 keeps its shards on its own disk, and n2 has none.
    own = "/tmp/own-digits"
    site.cluster.run("n1", "cp", "-r", site.preset.parent / "digits", own)
    bad = site.cluster.run("ctl", *words, "--data", own, check=False)
    assert "bad nodes: n2" in bad and f"--data {own}: no manifest.json: mount its disk" in bad


def test_two_steps_of_one_allocation_do_not_meet(site: Site) -> None:
    check = f"{sys.executable} -m launch check --ranks 2 --free 0 --seconds {LIMIT:g}"
    steps = f"for step in 1 2; do srun --overlap -N2 -n2 {check} & done; wait"
    said = site.cluster.run("ctl", "salloc", "-N2", "-n4", "bash", "-c", steps)
    assert said.count("all nodes are ready") == 2, said


def test_ranks_meet_in_the_order_of_a_host_file(site: Site) -> None:
    """Lightning#17228: rank 0 is not on the first host of Slurm's list."""
    order = site.cluster.home / "hostfile"
    order.write_text("n2\nn2\nn1\nn1\n")
    env = ["env", f"SLURM_HOSTFILE={order}"]
    words = [*env, "srun", "-n4", "-m", "arbitrary", sys.executable, "-m", "launch", "check"]
    said = site.cluster.run("ctl", *words, "--free", 0, "--seconds", LIMIT, check=False)
    assert "all nodes are ready" in said, said
    assert said.index("n2") < said.index("n1")


def test_a_second_job_on_the_same_run_is_refused(site: Site) -> None:
    job = site.submit("once", site.settings("slurm"), ENDLESS, nodes=1)
    wait_until(lambda: site.state(job) == "RUNNING", "the job")
    again = site.start("once", site.settings("slurm"), ENDLESS, nodes=1)
    hides = ["env", "SQUEUE_PARTITION=big"]  # in the user's own shell
    said = site.cluster.run("ctl", *hides, *again, check=False)
    assert f"job {job} of" in said and "RUNNING" in said
    site.wait_start("once", 0)
    alone = [sys.executable, "-m", "trainer.train", site.preset, "--run", site.run("once")]
    said = site.cluster.run("ctl", *alone, "--set", ENDLESS, check=False)
    assert re.search(rf"error: job {job} on n\d is writing", said)
    site.cluster.run("ctl", *site.words("stop", site.run("once")))
    assert "stopped as requested" in site.events("once")
    assert site.recorded("once").state == "stopped"
    assert site.state(job) == ""
