"""Runs under a real Slurm: time limits, preemption, dead nodes, cancellation, errors."""

import json
import os
import re
import signal

import pytest

from launch import records
from tests.support.cluster import LIMIT, wait_until
from tests.support.site import ENDLESS, Site
from tests.test_launch_texts import big_job

pytestmark = pytest.mark.timeout(4 * LIMIT)
IMAGES = 4000
LONG = (ENDLESS, "intervals.keep = 2")


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[int, float]:
    """The losses of a run that nothing interrupts. It also compiles what all others use."""
    sets = (f"training.images = {IMAGES}", f"intervals.checkpoint = {IMAGES}")
    job = site.submit("undisturbed", site.settings("slurm"), *sets)
    site.wait_gone(job)
    assert "finished" in site.events("undisturbed"), site.output("undisturbed")[-3000:]
    return site.losses("undisturbed")


def same_as(losses: dict[int, float], undisturbed: dict[int, float]) -> bool:
    """Whether the losses are bit for bit those of the undisturbed run, as far as both went."""
    common = losses.keys() & undisturbed.keys()
    return len(common) > 5 and all(losses[n] == undisturbed[n] for n in common)


def test_time_limits_are_survived_until_the_run_is_finished(
    site: Site, undisturbed: dict[int, float]
) -> None:
    # Slurm warns up to a minute early, so no length of run ends after two limits on every machine.
    sets = (ENDLESS, f"intervals.checkpoint = {IMAGES}", "intervals.keep = 9999")
    settings = site.settings("slurm", time='"1"')
    job = site.submit("limited", settings, *sets)
    early = 0

    def survived() -> bool:
        """Whether two limits were survived. A machine that is slow to start gets a longer one."""
        nonlocal early
        events = site.events("limited")
        saves = events.count("saved; requeued, resumes")
        if (found := events.count("; requeued, resumes") - saves) > early:
            early = found
            limit = f"TimeLimit={1 + early}"
            site.cluster.run("ctl", "scontrol", "update", f"JobId={job}", limit, check=False)
        return saves >= 2

    wait_until(survived, "two time limits", limit=2 * LIMIT)
    site.cluster.run("ctl", "scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    site.cluster.run("ctl", "scancel", job)
    site.wait_gone(job)
    # The same run, now with its end near.
    end = site.recorded("limited").images_seen // IMAGES * IMAGES + 2 * IMAGES
    job = site.submit("limited", site.settings("slurm"), f"training.images = {end}", *sets[1:])
    site.wait_gone(job)
    events = site.events("limited")
    assert events.count(": saved; requeued, resumes from checkpoint") >= 2, events
    assert events.endswith(": finished\n"), events
    losses = site.losses("limited")
    assert {n: losses[n] for n in undisturbed} == undisturbed
    for run, images in (("limited", end), ("undisturbed", IMAGES)):
        recorded = site.recorded(run)
        assert (recorded.state, recorded.checkpoint) == ("finished", f"{images:012d}")
    assert site.recorded("limited").starts >= 3
    state = [
        json.loads((site.run(run) / "checkpoints" / f"{IMAGES:012d}/state.json").read_text())
        for run in ("limited", "undisturbed")
    ]
    assert state[0]["files"] == state[1]["files"]  # their checksums


def test_preemption_power_loss_and_cancellation(site: Site, undisturbed: dict[int, float]) -> None:
    # As many sites have it. It leaves a socket where it is killed, and starts nothing beside that.
    pmix = ["export SLURM_MPI_TYPE=pmix"]
    job = site.submit("tried", site.settings("slurm", setup=pmix, partition='"low"'), *LONG)
    site.wait_start("tried", 0)
    site.cluster.run("ctl", "srun", "-p", "high", "-N2", "--gres=gpu:2", "true")
    site.wait_start("tried", 1)
    assert "start 0: saved; requeued, resumes" in site.events("tried")

    site.cluster.power_off("n2")
    wait_until(lambda: site.state(job) == "PENDING", "the requeued job")
    site.cluster.boot("n2")
    site.wait_start("tried", 2)

    site.cluster.run("ctl", "scancel", job)
    site.wait_gone(job)
    events = site.events("tried")
    assert "start 2: saved; cancelled, by scancel or by Slurm" in events
    assert site.recorded("tried").state == "stopped"
    assert site.recorded("tried").checkpoint == f"{site.rows('tried')[-1]['images']:012d}"
    assert same_as(site.losses("tried"), undisturbed)


def test_two_preemptions_while_the_ranks_start_are_no_failures(site: Site) -> None:
    job = site.submit("early", site.settings("slurm"), ENDLESS, nodes=1)

    def is_importing(starts: int) -> bool:
        return site.events("early").count("begins on") == starts and site.imports_torch("early")

    for starts in (1, 2):
        wait_until(lambda n=starts: is_importing(n), f"ranks of start {starts}")
        site.cluster.run("ctl", "scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: site.events("early").count("begins on") >= 3, "the third start")
    seen = site.recorded("early").images_seen
    wait_until(lambda: site.recorded("early").images_seen > seen, "steps of the third start")
    site.cluster.run("ctl", *site.words("stop", site.run("early")))
    events = site.events("early")
    assert "failed" not in events and "second time" not in events, events
    assert events.endswith(": stopped as requested\n"), f"{events}\n{site.output('early')[-3000:]}"
    assert not (site.run("early") / "launch" / "failed-at").exists()


def test_a_job_that_the_site_forbids_to_requeue_is_followed_by_another(site: Site) -> None:
    job = site.submit("denied", site.settings("slurm"), *LONG, nodes=1)
    site.wait_start("denied", 0)
    site.cluster.run("ctl", "scontrol", "update", f"JobId={job}", "Requeue=0")
    site.cluster.run("ctl", "scancel", "--signal=USR1", "--batch", job)
    site.wait_start("denied", 1)
    next_job = (site.run("denied") / "launch" / "job").read_text().strip()
    assert next_job != job
    said = f"saved; this job may not be requeued; submitted job {next_job}, which resumes"
    assert said in site.events("denied")
    site.cluster.run("ctl", *site.words("stop", site.run("denied")))
    assert site.state(next_job) == site.state(job) == ""


def test_an_old_rank_that_outlives_its_job_does_not_write(site: Site) -> None:
    job = site.submit("outlived", site.settings("slurm"), *LONG, nodes=1)
    site.wait_start("outlived", 0)
    host = site.cluster.run("ctl", "squeue", "-h", "-j", job, "-o", "%N").strip()
    old = set(site.cluster.pids(host, ["-m trainer.train", "outlived"]))
    assert len(old) >= 2
    try:
        for pid in site.cluster.pids(host, ["/usr/sbin/slurmd"]):
            os.kill(pid, signal.SIGKILL)
        site.wait_start("outlived", 1)
        words = ["-m trainer.train", "outlived"]
        wait_until(lambda: not old & set(site.cluster.pids(host, words)), "the old ranks' end")
        # What was written since the new start is one run's: nothing goes back or comes twice.
        whole_lines = site.log("outlived").rpartition("\n")[0]
        before, second = whole_lines.split("resumes from checkpoint ")
        seen = [int(w.split(" of")[0].replace(",", "")) for w in second.split("  images ")[1:]]
        assert seen == sorted(set(seen)) and seen[0] == int(second[:12]) + 8
        # It was Slurm that started the job again, and the old ranks had trained on meanwhile.
        events = site.events("outlived")
        assert "resumes from" not in events
        assert before.count("images/s") > 0 and int(second[:12]) > int(events.split()[-1])
    finally:
        site.cluster.run("ctl", *site.words("stop", site.run("outlived")))
        site.wait_gone(job)
        site.cluster.power_off(host)
        site.cluster.boot(host)
        wait_until(site.cluster.idle, "idle nodes")


@pytest.mark.parametrize("site_file", ["slurm", "slurm-pyxis"])
def test_slurm_would_start_the_job_of_512_gpus(site: Site, site_file: str) -> None:
    script = site.cluster.home / f"{site_file}.sh"
    script.write_text(records.text(big_job(site_file)))
    said = site.cluster.run("ctl", "sbatch", "--test-only", script)
    assert re.search(r"to start at .* using 6144 processors on nodes big\[01-64\]", said)


def test_what_is_refused_fails_once(site: Site) -> None:
    # The login node cannot see it: shards may be on the nodes' own disks.
    job = site.submit("poisoned", site.settings("slurm"), 'data.shards = "/nowhere/digits"')
    site.wait_gone(job)
    events = site.events("poisoned")
    assert events.count("begins on") == 1
    assert "refused for the reason above" in events
    assert "/nowhere/digits" in site.output("poisoned")
    assert not (site.run("poisoned") / "checkpoints").exists()


def test_a_gpu_job_whose_nodes_show_no_gpus_is_refused(site: Site) -> None:
    settings = site.settings("slurm")
    gpus = settings.with_name("gpus.toml")
    gpus.write_text(settings.read_text().replace("cpu = true", ""))
    job = site.submit("blind", gpus)
    site.wait_gone(job)
    events, output = site.events("blind"), site.output("blind")
    assert events.count("begins on") == 1 and "refused for the reason above" in events
    assert output.count("shows 0 GPUs, and the job needs") == 2, output  # the hosts differ
    assert len(re.findall(r"^\d: error: ", output, flags=re.M)) == 1
    assert not (site.run("blind") / "checkpoints").exists()


def test_a_run_that_fails_twice_without_progress_stops(site: Site) -> None:
    settings = site.settings("slurm")
    broken = settings.with_name("broken.toml")
    broken.write_text('python = "/nowhere/python"\n' + settings.read_text())
    job = site.submit("broken", broken)
    site.wait_gone(job)
    events = site.events("broken")
    assert events.count("begins on") == 2
    assert "at checkpoint none: not started again" in events
