"""The batch script under bash, with stand-ins for Slurm's programs: what is started again."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from launch import cluster as clusters
from launch import slurm
from launch.job import Job
from tests.support.cluster import ROOT
from trainer.runstate import RunState

# Ahead of what a test's own lines do, a stand-in notes its process for the others.
_PROGRAMS = {
    "srun": """\
case "$*" in *"launch check"*) step=check ;; *) step=ranks ;; esac
echo $step >> started
echo $$ > step
case "$SLURM_EXPORT_ENV $*" in *--export=ALL*) ;; NONE*) unset PYTHONPATH ;; esac
read -r _ _ _ script _ < "/proc/$PPID/stat"  # whose background this is
tell() { kill -s "$1" "$script"; }
. ./$step.sh""",
    "scancel": 'kill -USR1 "$(cat step)"; touch signalled',
    "scontrol": """\
case "$1 $2" in
  "show hostnames") echo "$SLURM_JOB_NODELIST" | tr , '\\n' ;;
  show*)
    [ -e requeued ] && state=COMPLETING
    [ -e fixed ] && requeue=0
    [ -e excluded ] && excluded=$(cat excluded)
    facts="Requeue=${requeue:-1} Restarts=$SLURM_RESTART_COUNT BatchFlag=1"
    facts="$facts ExcNodeList=${excluded:-(null)} Comment="
    echo " JobState=${state:-RUNNING} Reason=None Dependency=(null) $facts " ;;
  requeue*)
    echo requeue >> asked
    if [ -e denial ] && { cat denial >&2; [ ! -e once ] || rm denial; }; then exit 1; fi
    touch requeued ;;
esac""",
    "sbatch": """\
echo "$*" > submitted
env > env.txt
[ ! -e refusal ] || { cat refusal >&2; exit 1; }
echo "sbatch: a warning" >&2
echo '8;east'""",
}
DENIAL = "Requested operation is presently disabled for job 7"
# A minute, or until the job is put back into the queue, when Slurm kills its ranks.
LAST = "for try in {1..600}; do [ ! -e requeued ] || kill -9 $$; sleep 0.1; done"


@dataclass
class Bash:
    """Starts a job's script, as Slurm does, in a directory with the stand-ins."""

    directory: Path

    def start(
        self,
        number: int = 0,
        *,
        ranks: str,
        check: str | None = None,
        setup: str = ":",
        environment: Mapping[str, str] | None = None,
        seconds_to_save: int = 1,
        **variables: str,
    ) -> int:
        """Run a start of the job; the status it ends with.

        `ranks` and `check` are what those steps do; `tell USR1` signals the script. `variables` are
        the environment that Slurm gives the script.
        """
        settings = clusters.load(ROOT / "launch" / "clusters" / "slurm.toml")
        job = Job(
            run=self.directory / "run",
            nodes=1,
            gpus_per_node=1,
            directory=self.directory,
            cluster=replace(
                settings,
                seconds_to_save=seconds_to_save,
                setup=(setup,),
                environment=environment or {},
            ),
            check=check is not None,
        )
        job.records.mkdir(parents=True, exist_ok=True)
        (self.directory / "requeued").unlink(missing_ok=True)
        for name, lines in {"ranks": ranks, "check": check or ""}.items():
            (self.directory / f"{name}.sh").write_text(f"{lines}\n")
        (job.records / "job").write_text("7\n")
        for name, text in _PROGRAMS.items():
            file = self.directory / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!/bin/bash\n{text}\n")
            file.chmod(0o755)
        env = {
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1,n2,n3",
            "SLURM_RESTART_COUNT": str(number),
            **variables,
        }
        script = subprocess.run(["bash"], input=slurm.text(job), text=True, env=env, timeout=120)
        return script.returncode

    def text(self, name: str) -> str:
        file = self.directory / name
        return file.read_text() if file.exists() else ""

    @property
    def events(self) -> str:
        return self.text("run/launch/events.txt")

    @property
    def requeued(self) -> bool:
        """Whether the last start put the job back into the queue."""
        return (self.directory / "requeued").exists()


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


@pytest.mark.parametrize(
    "ranks",
    [
        "tell USR1; exec sleep 300",  # they die from the signal
        f"trap 'exit 75' USR1; tell USR1; {LAST}",
        f"trap 'exit 0' USR1; tell USR1; {LAST}",
        f"trap 'exit 1' USR1; tell USR1; {LAST}",
        f"trap '' USR1; tell USR1; {LAST}",
        "tell TERM; kill -TERM $$",
    ],
    ids=["killed", "75", "0", "1", "stays", "TERM"],
)
def test_a_job_that_is_told_to_leave_at_every_start_goes_on(bash: Bash, ranks: str) -> None:
    for number in range(3):
        bash.start(number, ranks=ranks)
        assert bash.requeued, bash.events
    assert bash.events.count("requeued, resumes from checkpoint none") == 3
    assert "failed" not in bash.events and not bash.text("run/launch/failed-at")


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


def test_ranks_do_not_believe_the_variables_of_the_shell_that_submitted_them(bash: Bash) -> None:
    shell = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "elsewhere"}
    note = 'echo "$MASTER_ADDR, $RANK, $WORLD_SIZE, $LOCAL_RANK, $MASTER_PORT" >> world'
    bash.start(ranks=note, MASTER_PORT="1", **shell)
    bash.start(ranks=note, environment={"MASTER_ADDR": "n7"}, **shell)
    bash.start(ranks=note, setup="export MASTER_PORT=29517", **shell)
    assert bash.text("world") == ", , , , \nn7, , , , \n, , , , 29517\n"


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
    assert bash.text("run/launch/job") == "8\n"
    seen = set(bash.text("env.txt").splitlines())
    assert seen >= {f"{k}={v}" for k, v in kept.items()}
    assert not [line for line in seen if line.startswith((*inherited, "SLURM_JOB_ID"))]


def test_a_run_that_is_told_to_leave_and_stays_is_followed_by_one_job(bash: Bash) -> None:
    (bash.directory / "fixed").touch()
    stays = "trap '' USR1; tell USR1; until [ -e submitted ]; do sleep 0.1; done; sleep 0.3"
    bash.start(ranks=stays)
    assert "did not leave in 0.9 s; this job may not be requeued; submitted job 8" in bash.events
    assert bash.events.count("submitted") == 1


def test_scontrol_and_sbatch_that_refuse_are_quoted(bash: Bash) -> None:
    (bash.directory / "denial").write_text(f"{DENIAL}\n")
    (bash.directory / "refusal").write_text("sbatch: error: not from a node\n")
    bash.start(ranks="exit 75")
    assert (
        f"saved; not requeued: {DENIAL}; no job was submitted to follow: sbatch: error: not "
        in (bash.events)
    )


def test_scontrol_that_times_out_is_asked_again(bash: Bash) -> None:
    timeout = "slurm_requeue error: Socket timed out on send/recv operation\n"
    (bash.directory / "denial").write_text(timeout)
    (bash.directory / "once").touch()
    bash.start(ranks="exit 75", setup="sleep() { :; }")
    assert bash.text("asked") == "requeue\nrequeue\n"
    assert "saved; requeued, resumes" in bash.events


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


def loses(host: str, *, checkpoint: int = 0) -> str:
    """What ranks leave behind when one of them is lost on `host`."""
    state = RunState(
        state="failed", lost=f"{host}.cluster", checkpoint=f"{checkpoint:012d}", starts=checkpoint
    )
    text = json.dumps(asdict(state), indent=1)
    return f"echo '{text}' > run/launch/state.json; exit 1"


def test_a_node_that_lost_ranks_twice_is_excluded(bash: Bash) -> None:
    (bash.directory / "excluded").write_text("n9\n")
    bash.start(0, ranks=loses("n2", checkpoint=8))
    bash.start(1, ranks=loses("n1", checkpoint=16))
    assert bash.requeued and not bash.text("submitted")
    bash.start(2, ranks=loses("n2", checkpoint=16))
    assert "failed with status 1; n2 lost ranks twice and is excluded; submitted job 8" in (
        bash.events
    )
    assert "--exclude=n9,n2 " in bash.text("submitted") and not bash.requeued


def test_the_record_of_an_earlier_start_makes_no_node_suspect(bash: Bash) -> None:
    bash.start(0, ranks=loses("n2"))
    bash.start(1, ranks="exit 1")  # before it claimed the run
    assert "failed with status 1, for the second time" in bash.events
    assert not bash.text("submitted")
