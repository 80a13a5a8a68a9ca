"""The batch script where it may not requeue its job: what follows, and what is said."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launch import cluster as clusters
from launch import slurm, status
from launch.job import Job
from tests.support.batch import DENIAL, Bash
from trainer.run.runstate import RunState


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


@pytest.mark.parametrize("fixed", [True, False], ids=["--no-requeue", "denied"])
def test_a_job_that_may_not_be_requeued_submits_the_one_that_follows(
    bash: Bash, fixed: bool
) -> None:
    (bash.directory / ("fixed" if fixed else "denial")).write_text(f"{DENIAL}\n")
    inherited = {"SLURM_MEM_PER_CPU": "500", "SBATCH_TIMELIMIT": "1"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "low"}
    assert bash.start(ranks="exit 75", **inherited, **kept) == 75
    why = "this job may not be requeued" if fixed else f"not requeued: {DENIAL}"
    said = f"saved; {why}; submitted job 8, which resumes from checkpoint none"
    assert said in bash.events and not bash.requeued
    assert bash.text("asked") == ("" if fixed else "requeue\n")  # a refusal is no time-out
    script = f"{bash.directory}/run/launch/job.sh"
    assert bash.text("submitted") == f"--parsable --dependency=afterany:7 {script}\n"
    assert bash.text("run/launch/job") == "8;east\n"
    seen = set(bash.text("env.txt").splitlines())
    assert seen >= {f"{k}={v}" for k, v in kept.items()}
    assert not [line for line in seen if line.startswith((*inherited, "SLURM_JOB_ID"))]


def test_a_run_that_is_told_to_leave_and_stays_is_followed_by_one_job(bash: Bash) -> None:
    (bash.directory / "fixed").touch()
    stays = "trap '' USR1; tell USR1; until [ -e submitted ]; do sleep 0.1; done; sleep 0.3"
    bash.start(ranks=stays)
    assert "did not leave in 0.9 s; this job may not be requeued; submitted job 8" in bash.events
    assert bash.events.count("submitted") == 1


def test_a_run_that_leaves_while_the_job_that_follows_is_submitted_gets_no_second(
    bash: Bash,
) -> None:
    for name in ("fixed", "busy"):
        (bash.directory / name).touch()
    bash.start(ranks="trap '' USR1; tell USR1; until [ -e submitted ]; do sleep 0.1; done")
    assert bash.text("submitted").count("--dependency=afterany:7") == 1
    assert bash.events.count("submitted job 8") == 1


def test_scontrol_and_sbatch_that_refuse_are_quoted(bash: Bash) -> None:
    (bash.directory / "denial").write_text(f"{DENIAL}\n")
    refusal = ("sbatch: error: AssocMaxSubmitJobLimit", "sbatch: error: not from a node")
    (bash.directory / "refusal").write_text("\n".join(refusal))
    bash.start(ranks="exit 75")
    said = f"saved; not requeued: {DENIAL}; no job was submitted to follow: {'; '.join(refusal)}: "
    assert said in bash.events
    shown = status.read(bash.directory / "run").event  # of which each event is a line
    assert shown is not None and said in shown


@pytest.mark.parametrize("said", ["Socket timed out on send", "Protocol authentication error"])
def test_scontrol_that_times_out_is_asked_again(bash: Bash, said: str) -> None:
    (bash.directory / "denial").write_text(f"slurm_requeue error: {said}\n")
    (bash.directory / "once").touch()
    bash.start(ranks="exit 75", setup="sleep() { :; }")
    assert bash.text("asked") == "requeue\nrequeue\n"
    assert "saved; requeued, resumes" in bash.events


def test_what_slurm_does_though_its_answer_is_late_is_done_once(bash: Bash) -> None:
    """toil#5459: a busy controller does what it was asked for after its answer was given up."""
    (bash.directory / "late").touch()
    bash.start(ranks="exit 75", setup="sleep() { :; }")
    assert bash.text("asked") == "requeue\nrequeue\n" and not bash.text("submitted")
    assert bash.events.endswith(": saved; requeued, resumes from checkpoint none\n")
    (bash.directory / "fixed").touch()
    bash.start(1, ranks="exit 75", setup="sleep() { :; }")
    assert bash.text("submitted").count("\n") == 1
    assert bash.events.endswith("submitted job 8, which resumes from checkpoint none\n")


def test_a_job_of_another_cluster_is_followed_by_one_there(bash: Bash) -> None:
    (bash.directory / "fixed").touch()
    bash.start(ranks="exit 75", setup="echo '7;east' > run/launch/job")
    assert "submitted job 8, which" in bash.events and bash.text("run/launch/job") == "8;east\n"
    bash.start(ranks="exit 75", setup="echo '7;east' > run/launch/job")  # job 8 is in the queue
    assert bash.text("submitted").count("\n") == 1 and bash.text("run/launch/job") == "8;east\n"


def test_no_requeue_of_the_user_counts() -> None:
    for slurm_settings in (
        clusters.Slurm(requeue=False),
        clusters.Slurm(options=("--no-requeue",)),
    ):
        job = Job(
            run=Path("/runs/a"),
            nodes=1,
            gpus_per_node=1,
            directory=Path("/"),
            cluster=clusters.Cluster(slurm=slurm_settings),
        )
        said = [line for line in slurm.text(job).splitlines() if "requeue" in line]
        assert [line for line in said if line.startswith("#SBATCH")][-1] == "#SBATCH --no-requeue"


def loses(host: str, *, checkpoint: int = 0, starts: int = 0) -> str:
    """What ranks leave behind when one of them is lost on `host`, as they name it."""
    state = RunState(state="failed", lost=host, checkpoint=f"{checkpoint:012d}", starts=starts)
    text = json.dumps(asdict(state), indent=1)
    return f"echo '{text}' > run/launch/state.json; exit 1"


@pytest.mark.parametrize(
    ("of_node", "of_host"),
    [("", ".cluster"), ("", ""), (".site.org", ".site.org")],
    ids=["domain of the machine's", "short", "domain of Slurm's"],
)
def test_a_node_that_lost_ranks_twice_is_excluded(bash: Bash, of_node: str, of_host: str) -> None:
    nodes = ",".join(f"{name}{of_node}" for name in ("n1", "n2", "n2-ib"))
    (bash.directory / "excluded").write_text("n9\n")
    bash.start(0, ranks=loses(f"n2{of_host}", checkpoint=8), SLURM_JOB_NODELIST=nodes)
    bash.start(1, ranks=loses(f"n1{of_host}", checkpoint=16), SLURM_JOB_NODELIST=nodes)
    assert bash.requeued and not bash.text("submitted")
    bash.start(2, ranks=loses(f"n2{of_host}", checkpoint=16), SLURM_JOB_NODELIST=nodes)
    said = f"failed with status 1; n2{of_node} lost ranks twice and is excluded; submitted job 8"
    assert said in bash.events
    assert f"--exclude=n9,n2{of_node} " in bash.text("submitted") and not bash.requeued


def test_the_record_of_an_earlier_start_makes_no_node_suspect(bash: Bash) -> None:
    bash.start(0, ranks=loses("n2.cluster"))
    bash.start(1, ranks="exit 1")  # before it claimed the run
    assert "failed with status 1, for the second time" in bash.events
    assert not bash.text("submitted")


@pytest.mark.parametrize(
    "said",
    [
        "srun: error: n2: task 3: Out Of Memory",
        "srun: error: n[1-2]: tasks 3,7-8: Out Of Memory",
        "slurmstepd-n2: error: Exceeded job memory limit",
    ],
)
def test_a_node_is_not_excluded_for_ranks_that_were_out_of_the_job_s_memory(
    bash: Bash, said: str
) -> None:
    killed = f"echo '{said}' >&2"
    for number in range(2):
        bash.start(number, ranks=f"{killed}; {loses('n2', checkpoint=8, starts=number)}")
    event = "failed with status 1 (out of host memory), for the second time at checkpoint"
    assert f"{event} 000000000008: not started again; raise memory" in bash.events
    assert not bash.text("submitted")
    # Of an earlier start it says nothing of the next ones, whose ranks do not print Slurm's words.
    printed = f"echo '0: {said}' >&2"
    for number, seen in ((2, 16), (3, 24)):
        bash.start(number, ranks=f"{printed}; {loses('n2', checkpoint=seen)}")
    assert "n2 lost ranks twice and is excluded" in bash.events
