"""Start, watch and stop runs, from a login node.

  python -m launch PRESET --run DIR --nodes N --gpus-per-node G [--cluster my.toml]
  python -m launch status DIR... [--watch | --json]      show the state of runs
  python -m launch stop DIR                    save, stop, and do not requeue
  python -m launch sweep PRESETS... --runs DIR --at-most K ...    several runs as one Slurm array
  python -m launch check                       preflight check, on every rank of an allocation

Rerun the same command to resume a run. `--dry-run` prints what would be submitted.
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

import argparse
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from data import files
from data.exits import REFUSED, CommandParser, exit_status
from launch import display, queue, records, slurm, status
from launch.cluster import LAUNCHERS, Cluster, load
from launch.job import Job
from launch.shell import quoted
from launch.signs import Signs
from trainer import config as configs
from trainer import ds_config as ds_configs
from trainer import settings
from trainer.adm.config import check as check_setting
from trainer.ranks import lease


def start(argv: Sequence[str]) -> int:
    """`python -m launch PRESET ...`: submit a run, or start it from here."""
    arguments = _start_parser().parse_args(argv)
    preset = settings.find(arguments.preset, directory=configs.PRESETS)
    job = _job(arguments, run=arguments.run, preset=preset)
    queued = job.cluster.launcher in ("slurm", "kubernetes")
    if arguments.detach and queued:
        raise ValueError(f"--detach: launcher = {job.cluster.launcher!r} does not need it")
    text = records.text(job)
    if arguments.dry_run:
        print(text, end="")
        return 0
    records.check_free(job.run)
    return _submit(job, records.prepare(job, preset=preset), detach=arguments.detach)


def sweep(argv: Sequence[str]) -> int:
    """`python -m launch sweep PRESETS...`: submit one Slurm array, with a run for each preset."""
    arguments = _sweep_parser().parse_args(argv)
    check_setting(arguments.at_most >= 1, "--at-most", arguments.at_most, "at least 1")
    presets = [settings.find(preset, directory=configs.PRESETS) for preset in arguments.presets]
    names = [preset.stem for preset in presets]
    check_setting(len(set(names)) == len(names), "PRESETS", names, "presets of different names")
    jobs = [_job(arguments, run=arguments.runs / preset.stem, preset=preset) for preset in presets]
    launcher = jobs[0].cluster.launcher
    check_setting(launcher == "slurm", "launcher", launcher, '"slurm" for a sweep')
    text = slurm.array_text(jobs, at_most=arguments.at_most)
    if arguments.dry_run:
        print(text, end="")
        return 0
    for job in jobs:
        records.check_free(job.run)
    for job, preset in zip(jobs, presets, strict=True):
        records.prepare(job, preset=preset)
    script = jobs[0].run.parent / "sweep.sh"
    files.write(script, text)
    array = queue.submit(script)
    for index, job in enumerate(jobs):
        records.keep_job_id(job, f"{array}_{index}")
    print(f"submitted {script} as job array {array}: {len(jobs)} runs, {arguments.at_most} at once")
    return 0


def stop(argv: Sequence[str]) -> int:
    """`python -m launch stop DIR`: request a stop, and wait until the ranks have saved."""
    parser = CommandParser(
        prog="python -m launch stop",
        description="Save a run and stop it. The job is not requeued.",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run directory")
    run = parser.parse_args(argv).run.absolute()
    if not (run / "launch").is_dir():
        raise ValueError(f"{run} is not a run directory")
    lease.request_stop(run)
    job_id = records.job_id(run)
    state = queue.state(job_id) if job_id else None
    if job_id and state and state.startswith("PENDING"):
        queue.cancel(job_id)
        print(f"job {job_id} was {state}; removed from the queue")
        return 0
    print("waiting for the ranks to save and stop (Ctrl-C ends the waiting, not the stop)")
    while (job_id and queue.state(job_id)) or lease.live_holder(run):
        time.sleep(2)
    print(f"stopped; last checkpoint: {status.last_checkpoint(run) or 'none'}")
    return 0


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
        print(display.text(shown), end="")
    faults = [each for each in found.values() if isinstance(each, str)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return REFUSED if faults else 0


def check(argv: Sequence[str]) -> int:
    """`python -m launch check`: the preflight check, started on every rank of an allocation."""
    from trainer import preflight  # needs torch, which a login node may not have

    return preflight.main(argv)


def _job(arguments: argparse.Namespace, *, run: Path, preset: Path) -> Job:
    """The job of a run. Its whole config has been checked, for its number of ranks."""
    config = configs.load(preset, arguments.set, unset=arguments.unset)
    job = Job(
        run=run.absolute(),
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cluster=load(arguments.cluster) if arguments.cluster else Cluster(launcher="alone"),
        directory=Path.cwd(),
        overrides=tuple(arguments.set),
        unset=tuple(arguments.unset),
        check=arguments.check,
        shards=config.data.shards,
    )
    ds_config = ds_configs.load(records.ROOT / "ds_config.json")
    ds_configs.resolve(ds_config, config=config, ranks=job.ranks)
    return job


def _submit(job: Job, script: Path, *, detach: bool) -> int:
    """Submit the script, start it in the background, or become the shell that runs it."""
    if job.cluster.launcher == "kubernetes":
        print(f"wrote {script}; to start it, run: kubectl apply -f {script}")
        return 0
    if job.cluster.launcher == "slurm":
        job_id = queue.submit(script)
        records.keep_job_id(job, job_id)
        print(f"submitted {script} as job {job_id}; output: {job.records}/slurm-{job_id}.out")
        return 0
    if detach:
        return _detach(job, script)
    # On Ctrl-C the ranks save, and a Python parent would kill this shell meanwhile.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and bash could not undo it
        signal.signal(ignored, signal.SIG_DFL)
    os.execvp("bash", ["bash", str(script)])


def _detach(job: Job, script: Path) -> int:
    """Start the script in a session of its own, which outlives the terminal."""
    output = job.records / "output.txt"
    with output.open("ab") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    verb = "python -m launch"
    print(f"started {script} in the background, process {process.pid} of {socket.gethostname()}")
    print(f"  output: {quoted(['tail', '-F', output])}")
    print(f"  state:  {verb} {quoted(['status', job.run])}")
    print(f"  stop:   {verb} {quoted(['stop', job.run])}")
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=int, default=1, help="number of machines (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=1,
        help="number of GPUs, and so of ranks, on each machine (default: %(default)s)",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="TOML",
        help="site settings, a file as in launch/clusters; its `launcher` is one of "
        f"{', '.join(LAUNCHERS)} (default: train on this machine)",
    )
    settings.add_overrides(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="run the preflight check before training (default: train at once)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be submitted, and write nothing (default: submit it)",
    )


def _start_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog="python -m launch", description=__doc__, formatter_class=layout)
    parser.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    _add_common(parser)
    parser.add_argument(
        "--detach",
        action="store_true",
        help="start in the background, for launchers without a queue (default: in the foreground)",
    )
    return parser


def _sweep_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m launch sweep",
        description="Submit one Slurm array, with a run for each preset.",
    )
    parser.add_argument(
        "presets", nargs="+", help="names in trainer/presets, or .toml files; each names its run"
    )
    parser.add_argument(
        "--runs", required=True, type=Path, help="the directory of the run directories"
    )
    parser.add_argument(
        "--at-most",
        type=int,
        default=1,
        help="number of runs that train at the same time (default: %(default)s)",
    )
    _add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    verbs = {"status": show, "stop": stop, "sweep": sweep, "check": check}
    verb = verbs.get(words[0]) if words else None
    try:
        return verb(words[1:]) if verb else start(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())
