"""A job's batch script under bash, with stand-ins for Slurm's programs."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch import cluster as clusters
from launch import slurm
from launch.job import Job
from tests.support.cluster import LIMIT, ROOT

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
    "scancel": """\
env | grep SCANCEL_ >> seen
# By the tree of processes (proctrack/linuxproc) Slurm does not find an orphan.
orphan="import os, time; os.setpgrp(); time.sleep(12); open('seen', 'w').write('the next start')"
[ ! -e ending ] || exec python3 -c "$orphan"
kill -USR1 "$(cat step)"
touch signalled""",
    "scontrol": """\
case "$1 $2" in
  "show hostnames") echo "$SLURM_JOB_NODELIST" | tr , '\\n' ;;
  show*)
    [ -e requeued ] && state=COMPLETING restarts=$((SLURM_RESTART_COUNT + 1))
    [ -e preempted ] && state=COMPLETING preempted=$(date "+${SLURM_TIME_FORMAT:-%FT%T}")
    [ -e over ] && state="COMPLETING Reason=TimeLimit"
    [ -e fixed ] && requeue=0
    [ -e excluded ] && excluded=$(cat excluded)
    facts="Requeue=${requeue:-1} Restarts=${restarts:-$SLURM_RESTART_COUNT} BatchFlag=1"
    [ -e limit ] && facts="$facts RunTime=1-00:00:09 TimeLimit=$(cat limit) EndTime=Unknown"
    facts="$facts PreemptTime=${preempted:-None} ExcNodeList=${excluded:-(null)} Comment="
    echo " JobState=${state:-RUNNING} Reason=None Dependency=(null) $facts " ;;
  requeue*)
    echo requeue >> asked
    [ ! -e requeued ] || { echo "Job is pending execution for job 7" >&2; exit 1; }
    [ ! -e late ] || { touch requeued; echo "Unexpected message received for job 7" >&2; exit 1; }
    if [ -e denial ] && { cat denial >&2; [ ! -e once ] || rm denial; }; then exit 1; fi
    touch requeued
    (trap '' TERM; for try in {1..20}; do kill -TERM 0; sleep 0.01; done) & ;;
esac""",
    "squeue": """\
echo "7|$PWD/run/launch/job.sh"
[ ! -e submitted ] || echo "8|$PWD/run/launch/job.sh"
""",
    "sbatch": """\
echo "$*" >> submitted
[ ! -e late ] || { echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1; }
[ ! -e busy ] || sleep 1
env > env.txt
[ ! -e refusal ] || { cat refusal >&2; exit 1; }
echo "sbatch: a warning" >&2
echo '8;east'""",
}
DENIAL = "Requested operation is presently disabled for job 7"
# How many a site's scripts begin, which a setup line may source.
STRICT = "set -Eeuo pipefail; trap 'exit 9' ERR TERM"
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
        # Slurm kills all processes of a job that it requeues, and so does the stand-in.
        with (self.directory / "slurm-7.out").open("a") as output:
            script = subprocess.run(
                ["bash"],
                input=slurm.text(job),
                text=True,
                env=env,
                timeout=LIMIT,
                start_new_session=True,
                stdout=subprocess.PIPE,  # to its end, which is that of all processes
                stderr=output,
            )
            print(script.stdout, (self.directory / "slurm-7.out").read_text())
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
