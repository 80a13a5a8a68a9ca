"""The batch script under bash, with stand-ins for Slurm's programs: what is started again."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from data.exits import REFUSED
from tests.support.batch import LAST, STRICT, Bash


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


LEAVES = {
    "killed": "tell USR1; exec sleep 300",  # they die from the signal
    "75": f"trap 'exit 75' USR1; tell USR1; {LAST}",
    "0": f"trap 'exit 0' USR1; tell USR1; {LAST}",
    "1": f"trap 'exit 1' USR1; tell USR1; {LAST}",
    "stays": f"trap '' USR1; tell USR1; {LAST}",
    "TERM": "tell TERM; kill -TERM $$",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Bash]]]:
    """A job for each way in which ranks leave, at two starts: they mostly wait, so all at once."""

    # Pytest makes its directory at the first call, and in two threads it makes two.
    places = {name: tmp_path_factory.mktemp(name) for name in LEAVES}

    def start_twice(name: str) -> Bash:
        bash = Bash(places[name])
        for number in range(2):  # a fault would end it at the second
            bash.start(number, ranks=LEAVES[name])
            assert bash.requeued, bash.events
        return bash

    with ThreadPoolExecutor(len(LEAVES)) as threads:
        yield {name: threads.submit(start_twice, name) for name in LEAVES}


@pytest.mark.parametrize("name", LEAVES)
def test_a_job_that_is_told_to_leave_at_every_start_goes_on(
    told: dict[str, Future[Bash]], name: str
) -> None:
    bash = told[name].result()
    assert bash.events.count("requeued, resumes from checkpoint none") == 2
    assert "failed" not in bash.events and not bash.text("run/launch/failed-at")


def test_on_a_full_disk_a_job_has_its_ranks_status_and_is_not_started_for_ever(
    bash: Bash, capfd: pytest.CaptureFixture[str]
) -> None:
    full = "trap '' XFSZ; ulimit -f 0"
    for status, said in ((REFUSED, "refused"), (1, "not requeued: cannot write")):
        assert bash.start(ranks=f"exit {status}", setup=full) == status
        assert said in capfd.readouterr().out and not bash.requeued


def test_a_job_that_is_told_to_leave_before_its_ranks_start_starts_none(bash: Bash) -> None:
    assert bash.start(ranks="exit 1", setup="kill -USR1 $$") == 75
    assert "told to leave before the ranks were started; requeued, resumes" in bash.events
    assert bash.text("started") == ""
    assert bash.requeued


def test_a_job_that_is_told_to_leave_during_the_check_is_no_fault_of_a_node(bash: Bash) -> None:
    assert bash.start(ranks="exit 1", check="tell USR1; exec sleep 300") == 75
    assert "told to leave before the ranks were started; requeued, resumes" in bash.events
    assert bash.text("started") == "check\n"
    assert bash.requeued


def test_a_signal_that_comes_while_the_ranks_are_started_is_repeated(bash: Bash) -> None:
    late = f"""\
trap '' USR1
tell USR1
until [ -e signalled ]; do sleep 0.1; done
trap 'exit 75' USR1
{LAST}"""
    assert bash.start(ranks=late, seconds_to_save=20) == 75
    assert "saved; requeued, resumes" in bash.events


def test_a_check_that_slurm_ends_is_no_fault_of_a_node(bash: Bash) -> None:
    bash.start(ranks="exit 1", check="kill -TERM $$")
    assert "a signal ended the check: status 143; requeued, resumes" in bash.events
    assert bash.requeued


def test_a_node_that_slurm_gives_up_is_no_stop_on_request(bash: Bash) -> None:
    state = '{\n "state": "stopped",\n "why": "by a signal"\n}\n'  # of the start before
    bash.start(ranks=f"printf '%s' '{state}' > run/launch/state.json")
    assert "srun ended in mid-run; requeued, resumes" in bash.events
    assert bash.requeued


def test_what_was_not_told_to_leave_fails_twice(bash: Bash) -> None:
    for number in range(2):
        assert bash.start(number, ranks="exit 1") == 1
        assert bash.requeued == (number == 0)
    assert "failed with status 1; requeued, resumes" in bash.events
    assert "failed with status 1, for the second time at checkpoint none" in bash.events


@pytest.mark.parametrize(
    ("at_limit", "checkpoint", "why"),
    [
        (False, "none", "by a signal before the first step"),
        (True, "none", "by a signal before the first step"),
        (True, "none", ""),  # in the first batch that is drawn
        (True, "000000000640", "by a signal"),  # in the evaluation that a start begins with
    ],
)
def test_a_time_limit_that_leaves_no_time_to_train_comes_twice(
    bash: Bash, at_limit: bool, checkpoint: str, why: str
) -> None:
    """A preemption is none, however often it comes; and a longer limit counts anew."""
    limit = bash.directory / "limit"
    known = f' "checkpoint": "{checkpoint}",\n' if checkpoint != "none" else ""
    state = bash.directory / "run" / "launch" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(f'{{\n{known} "why": "{why}"\n}}\n')
    for number, time in enumerate(("1-00:01:08", "1-00:01:10", "1-00:01:10")):
        limit.write_text(time) if at_limit else None
        assert bash.start(number, ranks="tell USR1; exit 75") == 75
        assert bash.requeued == (number < 2 or not at_limit)
    again = f" of 1-00:01:10, for the second time at checkpoint {checkpoint}: not started"
    assert (f" by its time limit{again}" in bash.events) == at_limit


def test_a_time_limit_while_images_are_drawn_comes_often(bash: Bash) -> None:
    (bash.directory / "limit").write_text("1-00:01:08")
    for number, told in enumerate(("USR1", "USR1", "TERM")):
        if told == "TERM":  # the limit was made shorter than what had run: no warning comes
            (bash.directory / "over").touch()
        drawn = f"""printf '{{\n "checkpoint": "{number + 1:012d}"\n}}\n' > run/launch/state.json"""
        assert bash.start(number, ranks=f"{drawn}; tell {told}; exit 75") == 75
        assert bash.requeued


@pytest.mark.parametrize("setup", [":", "export SLURM_TIME_FORMAT='%a %H:%M'"])
def test_a_job_that_the_site_cancels_to_preempt_it_is_started_again(setup: str, bash: Bash) -> None:
    """MFlowCode/MFC#1771: PreemptMode=CANCEL. A setup line may read the user's own variables."""
    (bash.directory / "preempted").touch()
    assert bash.start(ranks="tell TERM; exit 75", setup=setup) == 75
    assert "preempted; requeued, resumes" in bash.events and bash.requeued
    assert "saved; requeued before, resumes" in bash.events


def test_a_save_that_takes_longer_than_slurm_waits_does_not_end_the_run(bash: Bash) -> None:
    """After KillWait it kills the ranks and the script; what is requeued then starts again."""
    (bash.directory / "preempted").touch()
    waits = (
        "for try in {1..100}; do ! grep -q resumes run/launch/events.txt || break; sleep 0.1; done"
    )
    assert bash.start(ranks=f"trap '' TERM; tell TERM; {waits}; kill -9 $script") == -9
    assert "preempted; requeued, resumes" in bash.events and bash.requeued


@pytest.mark.parametrize("due", [" DUE TO PREEMPTION", ""])
def test_scancel_in_the_grace_time_of_a_preemption_ends_the_job(due: str, bash: Bash) -> None:
    """Slurm 22.05 shows both jobs alike; what its daemon prints is as it was under a real one."""
    (bash.directory / "preempted").touch()
    ended = f"slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-29T09:48:59{due} ***"
    assert bash.start(ranks=f"echo '{ended}' >&2; tell TERM; exit 75") == 75
    assert bash.requeued == bool(due)
    assert bash.requeued or "saved; cancelled, by scancel or by Slurm" in bash.events


def test_a_job_that_slurm_has_requeued_is_not_said_to_be_cancelled(bash: Bash) -> None:
    """As it does at a preemption without a grace time; it has counted the restart by then."""
    assert bash.start(ranks="touch requeued; tell TERM; exit 75") == 75
    assert bash.events.endswith("saved; requeued by Slurm\n")
    assert not bash.text("asked")


def test_what_a_user_sets_for_scancel_keeps_no_rank_from_being_told(bash: Bash) -> None:
    told = "trap '' USR1; tell USR1; until [ -e signalled ]; do sleep 0.1; done; exit 75"
    assert bash.start(ranks=told, SCANCEL_INTERACTIVE="true", seconds_to_save=20) == 75
    assert not bash.text("seen")


def test_no_signal_for_one_start_comes_to_the_next(bash: Bash) -> None:
    """Slurm lets nobody signal a job that it preempts, and scancel asks again and again."""
    (bash.directory / "ending").touch()
    assert bash.start(ranks="tell USR1; sleep 1; exit 75", seconds_to_save=20) == 75
    assert bash.requeued and not bash.text("seen")


def test_what_is_refused_or_faulty_is_not_started_again(bash: Bash) -> None:
    assert bash.start(ranks="tell USR1; exit 78") == 78
    assert bash.start(ranks="exit 0", check="exit 1") == 78
    assert "the check above found a fault; not started" in bash.events
    assert bash.text("started") == "ranks\ncheck\n"
    assert not bash.requeued


def test_a_job_submitted_with_export_none_runs_the_snapshot(bash: Bash) -> None:
    note = 'echo "$PYTHONPATH" >> paths'
    bash.start(ranks=note, check=note, SLURM_EXPORT_ENV="NONE")
    assert bash.text("paths") == 2 * f"{bash.directory}/run/code\n"


def test_the_setup_sees_the_environment_of_the_site_and_does_not_change_it(bash: Bash) -> None:
    """Modules read variables such as MODULEPATH, and set others, such as CUDA_HOME."""
    site = {"MODULEPATH": "/site/modules", "CUDA_HOME": "/site/cuda"}
    load = 'echo "$MODULEPATH" >> seen; export CUDA_HOME=/other MODULEPATH=/other LOADED=yes'
    bash.start(ranks='echo "$MODULEPATH $CUDA_HOME $LOADED" >> seen', setup=load, environment=site)
    assert bash.text("seen") == "/site/modules\n/site/modules /site/cuda yes\n"


def test_ranks_do_not_believe_the_variables_of_the_shell_that_submitted_them(bash: Bash) -> None:
    shell = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "elsewhere"}
    note = 'echo "$MASTER_ADDR, $RANK, $WORLD_SIZE, $LOCAL_RANK, $MASTER_PORT" >> world'
    bash.start(ranks=note, MASTER_PORT="1", **shell)
    bash.start(ranks=note, environment={"MASTER_ADDR": "n7"}, **shell)
    bash.start(ranks=note, setup="export MASTER_PORT=29517", **shell)
    assert bash.text("world") == ", , , , \nn7, , , , \n, , , , 29517\n"
    # That of `srun --mpi=pmi2 --pty bash`, or of a shell under mpirun.
    shell = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}
    bash.start(ranks="env | grep -E '^(PMI|OMPI)' >> world", **shell)
    assert bash.text("world").count("\n") == 3


def test_a_node_without_scontrol_is_named_before_it_trains(bash: Bash) -> None:
    """submitit#1601: it is found out only when the job shall be requeued."""
    hidden = "command() { [ $2 != scontrol ]; }"
    assert bash.start(ranks="exit 75", setup=hidden) == REFUSED
    assert "there is no scontrol on" in bash.events and "in setup; not started" in bash.events
    assert not bash.text("started")


def test_what_a_setup_line_sets_for_its_own_script_does_not_end_the_job(bash: Bash) -> None:
    names = (
        "told=1 timer=1 before=1; say() { :; }; again() { :; }; begin() { :; }; ask() { false; }"
    )
    setup = f"{STRICT}; run=/nowhere job=9 start=4 {names}; trap 'touch cleaned' EXIT"
    assert bash.start(ranks="exit 1", setup=setup) == 1
    assert (bash.directory / "cleaned").exists()
    assert "job 7 start 0: failed with status 1; requeued, resumes" in bash.events
    assert bash.start(1, ranks=LEAVES["TERM"], setup=setup) == 143
    assert "start 1: told to leave, ended with status 143; requeued, resumes" in bash.events


def test_a_setup_line_that_fails_on_a_node_ends_the_job_and_is_named(bash: Bash) -> None:
    assert bash.start(ranks="exit 0", setup="false || (exit 3)") == REFUSED
    assert "the setup line failed with status 3: false || (exit 3); not started" in bash.events
    assert bash.start(ranks="exit 0", setup="exit 0  # in a file") == REFUSED  # not finished
    assert "the setup line ended the script with status 0: exit 0  # in a file;" in bash.events
    assert bash.events.count("not started") == 2
    assert not bash.text("started") and not bash.requeued
