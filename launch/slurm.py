"""Slurm: a job as the text that `sbatch` gets, and what the queue says about it.

One `srun` task per GPU and no second launcher. Ahead of the time limit, and when preempted, the
ranks save and leave with status 75, and the job puts itself back into the queue until the run is
finished. A node that fails is Slurm's affair: it requeues. The text is bash alone, since it runs
outside of any container, on nodes whose own Python may be old.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import quoted
from launch.exits import REFUSED, TO_BE_CONTINUED
from launch.job import Job, command, preamble

_BODY = """\
# {name}: {nodes} nodes x {gpus} ranks, from the code and the preset in {run}.
run={run}
# The plain number of an array's last task is the whole array's.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
start=${{SLURM_RESTART_COUNT:-0}}
told=
timer=
status=
trap leave USR1
trap told=yes TERM  # the ranks get it too; this shell stays to say what became of them

say() {{
  printf '%s  job %s start %s: %s\\n' "$(date '+%F %T')" "$job" "$start" "$*" |
    tee -a "$run/launch/events.txt"
}}

newest() {{
  newest=$(ls "$run/checkpoints" 2> /dev/null | grep -Ex '[0-9]{{12}}' | tail -n 1)
  echo "${{newest:-none}}"
}}

# Whatever the controller is asked, it may be busy or starting again: insist for five minutes.
insist() {{
  for pause in 5 10 15 30 60 60 60 60; do
    "$@" && return
    sleep $pause
  done
  "$@"
}}

# A cancelled job stays so, and a shell whose node Slurm gave up must not touch the next start.
# Without progress since the last start that failed, another one would not help. A start that was
# told to leave did not fail, however it ended.
again() {{
  case $(insist scontrol show job -o "$job") in
    *" JobState=RUNNING "*" Restarts=$start "*)
      if [ "$status" != {more} ] && [ -z "$told" ]; then
        if [ "$(cat "$run/launch/failed-at" 2> /dev/null)" = "$(newest)" ]; then
          say "$1, for the second time at checkpoint $(newest): not started again"
          return
        fi
        newest > "$run/launch/failed-at"
      fi
      say "$1; goes on from checkpoint $(newest)"
      insist scontrol requeue "$job" || say "scontrol does not answer: start the run again" ;;
    "") say "$1; scontrol does not answer: start the run again" ;;
    *) say "$1; cancelled, or already started again" ;;
  esac
}}

# The signal is repeated, since a rank that is being started misses it. Beyond the time limit Slurm
# would not start the job again.
leave() {{
  told=yes
  [ -z "$timer" ] || return
  {{
    for try in 1 2 3 4 5 6 7 8 9; do
      scancel --signal=USR1 "$job" &
      sleep {tenth}
    done
    again "did not leave in {seconds} s"
  }} &
  timer=$!
}}

# A trap runs while bash waits, but not while a command runs in the foreground.
finish() {{
  wait "$1"
  while kill -0 "$1" 2> /dev/null; do wait "$1"; done  # a signal ended the wait before
  wait "$1"
}}

{preamble}

say "begins on $SLURM_JOB_NODELIST at checkpoint $(newest)"
{check}if [ -n "$told" ]; then
  [ -z "$timer" ] || kill "$timer"
  again "told to leave before the ranks were started"
  exit {more}
fi
{srun} &
finish $!
status=$?
[ -z "$timer" ] || kill "$timer" 2> /dev/null

case $status in
  0)  # also what srun says when Slurm has given the job's node up
    case $(tail -n 1 "$run/log.txt") in
      *finished*) say "finished" ;;
      *"asked to stop"*) say "stopped as asked" ;;
      *) again "srun ended in mid-run" ;;
    esac ;;
  {refused}) say "refused for the reason above; not started again" ;;
  {more})
    if [ -e "$run/launch/stop" ]; then
      say "stopped as asked"
    elif tail -n 1 "$run/log.txt" 2> /dev/null | grep -q "before the first step"; then
      again "told to leave before the first step"
    else
      again saved
    fi ;;
  *)
    if [ -n "$told" ]; then
      again "told to leave, ended with status $status"
    else
      again "failed with status $status"
    fi ;;
esac
exit $status
"""

_CHECK = """\
{command} &
finish $!
status=$?
if [ -z "$told" ] && [ $status -gt 128 ]; then
  again "a signal ended the check: status $status"
  exit $status
elif [ -z "$told" ] && [ $status != 0 ]; then
  say "the check above found a fault; not started"
  exit {refused}
fi
"""

#: Until the trainer's first line Python has no handler, and either signal would kill the rank.
_WITHOUT_SIGNALS = ("sh", "-c", 'trap "" USR1 TERM; exec "$0" "$@"')


def text(job: Job) -> str:
    """The batch script of one run."""
    header = _header(job, output=f"{job.records}/slurm-%j.out")
    python, seconds = job.cluster.python, job.cluster.slurm.seconds_to_save
    check = ""
    if job.check:
        check = _CHECK.format(command=_srun(job, python, *job.checking), refused=REFUSED)
    body = _BODY.format(
        name=job.name, nodes=job.nodes, gpus=job.gpus_per_node, run=quoted([job.run]),
        tenth=f"{seconds / 10:g}", seconds=f"{seconds * 9 / 10:g}", preamble=preamble(job),
        check=check, srun=_srun(job, *_WITHOUT_SIGNALS, python, *job.training),
        refused=REFUSED, more=TO_BE_CONTINUED,
    )  # fmt: skip
    return f"{header}\n{body}"


def array_text(jobs: Sequence[Job], *, at_most: int) -> str:
    """The batch script of an array that runs the jobs' own scripts, `at_most` at once.

    The jobs have the same size and cluster; each one's script is already in its run directory.
    """
    records = jobs[0].run.parent / "sweep-%A-%a.out"
    header = _header(jobs[0], output=str(records), array=f"0-{len(jobs) - 1}%{at_most}")
    scripts = "\n".join(f"  {quoted([job.records / 'job.sh'])}" for job in jobs)
    return (
        f"{header}\nscripts=(\n{scripts}\n)\n"
        'exec bash "${scripts[$SLURM_ARRAY_TASK_ID]}"\n'
    )  # fmt: skip


def _header(job: Job, *, output: str, array: str | None = None) -> str:
    slurm = job.cluster.slurm
    asked = {
        "job-name": job.name if array is None else f"{job.run.parent.name}-sweep",
        "array": array,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gres": f"{slurm.gres}:{job.gpus_per_node}",
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "signal": f"B:USR1@{slurm.seconds_to_save}",
        "output": output,
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    lines = [*options, *slurm.options, "--open-mode=append", "--requeue"]
    return "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines)


def _srun(job: Job, *program: str) -> str:
    """One task per GPU.

    When one ends the others have a minute to end by themselves: to be killed at once, as by
    --kill-on-bad-exit=1, would hide the status that they leave with, and who was lost.
    """
    container = job.cluster.container
    options = container.srun_options(directory=job.directory) if container else ()
    inside = container.command(directory=job.directory) if container else ()
    # Since Slurm 22.05 srun does not take the number of CPUs over from the job.
    cpus = job.cluster.slurm.cpus_per_task
    per_task = [f"--cpus-per-task={cpus}"] if cpus else []
    start = command("srun", "--kill-on-bad-exit=0", "--wait=60", "--label", *per_task, *options)
    return f"{start} \\\n  {command(*inside, *program)}"


def submit(script: Path) -> str:
    """Hand a batch script to Slurm; the job's number.

    Raises:
        ValueError: Slurm refuses it.
    """
    return _slurm("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def state(number: str) -> str | None:
    """Such as "RUNNING" or "PENDING (Resources)"; None when the queue does not know the job.

    Raises:
        ValueError: Slurm does not answer.
    """
    try:
        found = _slurm("squeue", "-h", "-j", number, "-o", "%T|%r").split("\n")[0]
    except ValueError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    what, _, why = found.partition("|")
    return (f"{what} ({why})" if why not in ("", "None") else what) or None


def end(number: str) -> str | None:
    """How a job ended that the queue does not know any more, such as "CANCELLED by 0".

    None where Slurm has forgotten it: it remembers for minutes, or as long as it has accounting.
    """
    try:
        accounted = _slurm("sacct", "-n", "-X", "-P", "-j", number, "-o", "State").split("\n")[0]
        if accounted:
            return accounted
    except ValueError:
        pass  # no accounting here
    try:
        found = re.search(r" JobState=(\S+)", _slurm("scontrol", "show", "job", "-o", number))
    except ValueError:
        return None
    return found[1] if found else None


def cancel(number: str) -> None:
    """Take a job that has not begun out of the queue."""
    _slurm("scancel", number)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{command[0]} did not answer: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ValueError(f"{command[0]}: {said[-1]}")
    return done.stdout


def hosts(nodelist: str) -> list[str]:
    """The hosts of a Slurm list: "gpu[07-09,12],cpu1" -> gpu07, gpu08, gpu09, gpu12, cpu1."""
    found: list[str] = []
    for prefix, inside, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist):
        for span in inside.split(",") if inside else [""]:
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            found += [
                prefix if n is None else f"{prefix}{n:0{len(first)}d}{suffix}" for n in numbers
            ]
    return found
