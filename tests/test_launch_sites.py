"""Runs under a real Slurm whose ways are not those of most: it answers late, or cancels jobs."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.cluster import LIMIT, wait_until
from tests.support.site import ENDLESS, Site

pytestmark = pytest.mark.timeout(4 * LIMIT)
# Slurm's commands give an answer up after 10 seconds (MessageTimeout); tried again 5 seconds later.
_BUSY = 12.0
# A program of Slurm's that waits in this way before it asks for something.
_WAITS = '{ until [ -e "$BUSY" ]; do touch "$BUSY.wanted"; sleep 0.1; done; }'


@pytest.fixture
def gate(site: Site) -> Iterator[str]:
    """A file that is made once the controller is busy; in a cluster file's setup, BUSY names it."""
    file = site.cluster.disk / "busy"
    yield f"export BUSY={file}"
    for left in (file, file.with_name("busy.wanted")):
        left.unlink(missing_ok=True)


@contextmanager
def busy(site: Site) -> Iterator[None]:
    """Wait until something is about to be asked for, and keep the controller from answering it."""
    (controller,) = site.cluster.pids("ctl", ["/usr/sbin/slurmctld"])
    file = site.cluster.disk / "busy"
    wait_until(file.with_name("busy.wanted").exists, "a request")
    os.kill(controller, signal.SIGSTOP)
    try:
        file.touch()
        time.sleep(_BUSY)
    finally:
        os.kill(controller, signal.SIGCONT)
    yield


def jobs(site: Site, name: str) -> list[str]:
    """The jobs of a run that are in the queue."""
    shown = site.cluster.run("ctl", "squeue", "-h", "-o", "%i|%o").splitlines()
    script = str(site.run(name) / "launch" / "job.sh")
    return [job for job, _, command in (line.partition("|") for line in shown) if command == script]


def test_a_busy_controller_requeues_a_job_once(site: Site, gate: str) -> None:
    function = f'scontrol() {{ [ "$1" != requeue ] || {_WAITS}; command scontrol "$@"; }}'
    job = site.submit("late", site.settings("slurm", setup=(gate, function)), ENDLESS, nodes=1)
    site.wait_start("late", 0)
    site.cluster.run("ctl", "scancel", "--signal=USR1", "--batch", job)
    with busy(site):
        site.wait_start("late", 1)
    events = site.events("late")
    assert "start 0: saved; requeued, resumes" in events, events
    assert jobs(site, "late") == [job]
    site.cluster.run("ctl", *site.words("stop", site.run("late")))


def test_a_busy_controller_starts_one_job_that_follows(site: Site, gate: str) -> None:
    function = f'env() {{ [[ $* != *" sbatch "* ]] || {_WAITS}; command env "$@"; }}'
    settings = site.settings("slurm", setup=(gate, function), requeue="false")
    job = site.submit("followed", settings, ENDLESS, nodes=1)
    site.wait_start("followed", 0)
    site.cluster.run("ctl", "scancel", "--signal=USR1", "--batch", job)
    with busy(site):
        site.wait_start("followed", 1)
    next_job = (site.run("followed") / "launch" / "job").read_text().strip()
    assert f"submitted job {next_job}, which resumes" in site.events("followed")
    assert jobs(site, "followed") == [next_job]
    site.cluster.run("ctl", *site.words("stop", site.run("followed")))


def test_a_busy_controller_takes_a_job_once(site: Site, gate: str) -> None:
    sbatch = site.cluster.disk / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\n{gate}\n{_WAITS}\nPATH=${{PATH#*:}} exec sbatch "$@"\n')
    sbatch.chmod(0o755)
    path = f"PATH={sbatch.parent}:{site.cluster.environment['PATH']}"
    words = site.start("taken", site.settings("slurm"), ENDLESS, nodes=1)
    launch = site.cluster.start("ctl", "env", path, *words)
    with busy(site):
        said = launch.communicate(timeout=LIMIT)[0]
    job = (site.run("taken") / "launch" / "job").read_text().strip()
    assert launch.returncode == 0 and f"job.sh as job {job}; output" in said, said
    assert jobs(site, "taken") == [job]
    site.cluster.run("ctl", *site.words("stop", site.run("taken")))


def test_a_job_that_slurm_cancels_to_preempt_it_goes_on(site: Site) -> None:
    settings = site.settings("slurm", partition='"cancelled"')
    job = site.submit("preempted", settings, ENDLESS, nodes=1)
    site.wait_start("preempted", 0)
    site.cluster.run("ctl", "srun", "-p", "high", "-N2", "--gres=gpu:2", "true")
    site.wait_start("preempted", 1)
    events = site.events("preempted")
    assert "start 0: preempted; requeued, resumes" in events, events
    assert "start 0: saved; requeued before, resumes" in events, events
    assert jobs(site, "preempted") == [job]
    site.cluster.run("ctl", "scancel", job)
    site.wait_gone(job)
    assert "start 1: saved; cancelled, by scancel or by Slurm" in site.events("preempted")


def test_a_job_that_no_wait_starts_says_so_unless_another_partition_may_take_it(site: Site) -> None:
    def change(*words: str) -> None:
        site.cluster.run("ctl", "scontrol", "update", *words)

    said = {}
    change("PartitionName=low", "MaxTime=5")
    change("PartitionName=main", "State=DOWN")
    try:
        for name, partition in (("long", '"low"'), ("elsewhere", '"main,low"')):
            settings = site.settings("slurm", partition=partition, time='"10"')
            site.submit(name, settings, ENDLESS, nodes=1)
            status = site.words("status", site.run(name))

            def shown(words: list[object] = status) -> str:
                return " ".join(site.cluster.run("ctl", *words).split())

            wait_until(lambda f=shown: "(PartitionTimeLimit" in f(), f"why {name} waits")
            again = site.start(name, settings, nodes=1)
            said[name] = shown() + site.cluster.run("ctl", *again, check=False)
            site.cluster.run("ctl", *site.words("stop", site.run(name)))
    finally:
        change("PartitionName=low", "MaxTime=INFINITE")
        change("PartitionName=main", "State=UP")
    assert said["long"].count("(PartitionTimeLimit): waiting does not start it: stop it with") == 2
    assert said["elsewhere"].count("(PartitionTimeLimit in one of main,low)") == 2
    assert "in one of main,low): wait for it, or stop it" in said["elsewhere"]
