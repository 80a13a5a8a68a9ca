"""Start, watch and stop runs, from a login node.

  python -m launch PRESET --run DIR --nodes N --gpus-per-node G [--cluster my.toml]
  python -m launch status DIR... [--watch | --json]      show the state of runs
  python -m launch stop DIR                    save, stop, and do not requeue
  python -m launch sweep PRESETS... --runs DIR --at-most K ...    several runs as one Slurm array
  python -m launch sample RUN --out FILE.npz ...    draw images, by trainer.sample on every launcher
  python -m launch check                       preflight check, on every rank of an allocation

Rerun the same command to resume a run. `--dry-run` prints what would be submitted. A run's log is
DIR/log.txt, its ranks' output is in DIR/launch/.
Exit status: 78 for a user error (an option, a setting, a file).
"""

import sys

# Ahead of all other imports, which an older Python may not have.
if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"error: Python {version} ({sys.executable}): must be Python 3.11 or newer; load such a "
        "module, or name the interpreter, such as `python3.11 -m launch ...`",
        file=sys.stderr,
    )
    sys.exit(78)

import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from data import files
from data.exits import REFUSED, CommandParser, reported
from launch import begin, display, queue, records, status
from launch.signs import Signs
from trainer.config import settings
from trainer.config.experiment import PRESETS
from trainer.run import lease


def stop(argv: Sequence[str]) -> int:
    """`python -m launch stop DIR`: request a stop, and wait until the ranks have saved."""
    parser = CommandParser(
        prog="python -m launch stop", description="Save a run and stop it. The job is not requeued."
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run directory")
    run = parser.parse_args(argv).run.absolute()
    if not (records.is_of_job(run) or (run / "config.toml").is_file()):
        raise ValueError(status.not_a_run(run))
    job_id = records.job_id(run)
    state = _state(job_id, is_finished=status.is_finished(run))
    if status.is_finished(run) and not state and not lease.live_holder(run):
        print(f"{run} is finished: there is nothing to stop")
        return 0
    lease.request_stop(run)
    # By the clock of the files, as the time of a checkpoint is: this machine's may differ.
    requested, since = files.touched(lease.stop_file(run)) / 1e9, time.monotonic()
    try:
        if job_id and state and state.startswith("SUSPENDED"):
            now = f"`scancel {job_id.replace(';', ' -M ')}` ends it now, without saving"
            print(f"job {queue.shown(job_id)} is suspended: it saves when Slurm resumes it; {now}")
        if not (state and queue.is_waiting(state)):
            print("waiting for the ranks to save and stop (Ctrl-C ends the waiting, not the stop)")
        while not _has_ended(run):
            time.sleep(2)
    except KeyboardInterrupt:
        print("\nnot waiting any more: the ranks save and stop by themselves")
        return 128 + signal.SIGINT
    saved = ""
    if not status.is_of_drawing(run):
        present = requested + time.monotonic() - since
        saved = f"last checkpoint: {status.last_checkpoint(run, now=present) or 'none'}; "
    print(f"stopped; {saved}{lease.way_to_resume(run)}")
    return 0


def _state(job_id: str | None, *, is_finished: bool) -> str | None:
    """The state of the run's job, or None; a run that trains is stopped though Slurm is busy."""
    try:
        return queue.state(job_id) if job_id else None
    except queue.NoAnswer as error:
        if is_finished:
            raise
        print(f"Slurm does not respond now, and is asked again: {str(error).splitlines()[-1]}")
        return None


def _has_ended(run: Path) -> bool:
    """Whether nothing of a run is left that trains or is going to.

    Its job is removed where it waits in the queue: Slurm, or the job itself, may requeue it now.
    """
    job_id = records.job_id(run)
    try:
        state = queue.state(job_id) if job_id else None
        if job_id and state and queue.is_waiting(state):
            _remove(job_id)
            print(f"job {queue.shown(job_id)} was {state}; removed from the queue")
            state = None
    except queue.NoAnswer:  # it is asked again
        return False
    return not (state or lease.live_holder(run) or records.is_claimed(run))


def _remove(job_id: str) -> None:
    try:
        queue.cancel(job_id)
    except queue.NoAnswer:
        raise
    except ValueError as error:  # it is another user's
        raise ValueError(
            f"{error}: the request to stop stays, so that job {queue.shown(job_id)} ends when it "
            "starts; its owner can remove it now by the same `python -m launch stop`"
        ) from None


def show(argv: Sequence[str]) -> int:
    """`python -m launch status DIR...`: print the state of runs."""
    parser = CommandParser(prog="python -m launch status", description="Show the state of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="the run directories")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        action="store_true",
        help="refresh every 2 seconds until Ctrl-C (default: print once)",
    )
    how.add_argument("--json", action="store_true", help="print JSON (default: text)")
    arguments = parser.parse_args(argv)
    if arguments.watch:
        display.watch(arguments.runs)
        return 0
    found = display.look(arguments.runs, signs=Signs())
    if arguments.json:
        print(display.as_json(found), end="")
    else:
        shown = {run: each for run, each in found.items() if not isinstance(each, str)}
        width = shutil.get_terminal_size().columns
        print(display.text(shown, width=width), end="")
    faults = [each for each in found.values() if isinstance(each, str)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return REFUSED if faults else 0


def check(argv: Sequence[str]) -> int:
    """`python -m launch check`: the preflight check, started on every rank of an allocation."""
    from trainer import allocation  # needs torch, which a login node may not have

    return allocation.main(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0].startswith("--local_rank="):  # of `deepspeed`, whose ranks may check
        words = words[1:]
    ours = {"status": show, "stop": stop, "check": check}
    verbs = {**ours, "sweep": begin.sweep, "sample": begin.sample}
    verb = verbs.get(words[0]) if words else None
    if verb:
        return reported(lambda: verb(words[1:]))
    return reported(lambda: _start(words, verbs))


def _start(words: Sequence[str], verbs: Iterable[str]) -> int:
    """Start a run. Its preset is looked for before argparse finds that options are missing."""
    if words and not words[0].startswith("-"):
        try:
            settings.find(words[0], directory=PRESETS)
        except ValueError as error:
            raise ValueError(f"{error}; verbs are {', '.join(verbs)}") from None
    return begin.start(words, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
