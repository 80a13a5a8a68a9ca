"""From a login node to a finished run.

  python -m launch PRESET --run DIR --nodes N --gpus-per-node G [--cluster my.toml]
  python -m launch status DIR... [--watch]     where runs stand
  python -m launch stop DIR                    save, leave, and do not start again
  python -m launch sweep PRESETS... --runs DIR --at-most K ...    a set of runs as one Slurm array
  python -m launch check                       look an allocation over, from inside of it

The same command on a run that is there goes on with it. `--dry-run` prints what would be started.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import slurm, snapshot, status, writer
from launch.cluster import LAUNCHERS, Cluster, load
from launch.job import Job

#: Exit status after an error of the user's.
REFUSED = 2


def start(argv: Sequence[str]) -> int:
    """`python -m launch PRESET ...`: submit a run, or train it from here."""
    arguments = _start_parser().parse_args(argv)
    preset = snapshot.find_preset(arguments.preset)
    job = _job(arguments, run=arguments.run, preset=preset)
    if arguments.dry_run:
        print(snapshot.text(job), end="")
        return 0
    snapshot.check_free(job.run)
    return _submit(job, snapshot.prepare(job, preset=preset))


def sweep(argv: Sequence[str]) -> int:
    """`python -m launch sweep PRESETS...`: one Slurm array, a run for each preset."""
    arguments = _sweep_parser().parse_args(argv)
    presets = [snapshot.find_preset(preset) for preset in arguments.presets]
    jobs = [_job(arguments, run=arguments.runs / preset.stem, preset=preset) for preset in presets]
    if len({job.run for job in jobs}) < len(jobs):
        raise ValueError("two of the presets have the same name: each needs a run of its own")
    if jobs[0].cluster.launcher != "slurm":
        raise ValueError(f"launcher = {jobs[0].cluster.launcher!r}: a sweep is an array of Slurm's")
    text = slurm.array_text(jobs, at_most=arguments.at_most)
    if arguments.dry_run:
        print(text, end="")
        return 0
    for job, preset in zip(jobs, presets, strict=True):
        snapshot.check_free(job.run)
        snapshot.prepare(job, preset=preset)
    script = jobs[0].run.parent / "sweep.sh"
    script.write_text(text)
    array = slurm.submit(script)
    for index, job in enumerate(jobs):
        (job.records / "job").write_text(f"{array}_{index}\n")
    print(f"submitted {script} as array {array}: {len(jobs)} runs, {arguments.at_most} at once")
    return 0


def stop(argv: Sequence[str]) -> int:
    """`python -m launch stop DIR`: the ranks save and leave; returns when they are gone."""
    parser = argparse.ArgumentParser(prog="python -m launch stop")
    parser.add_argument("run", type=Path)
    run = parser.parse_args(argv).run.absolute()
    if not (run / "launch").is_dir():
        raise ValueError(f"{run} is no run directory")
    writer.request_stop(run)
    job = snapshot.number(run)
    waiting = slurm.state(job) if job else None
    if job and waiting and waiting.startswith("PENDING"):
        slurm.cancel(job)
        print(f"job {job} was {waiting}; taken out of the queue")
        return 0
    print("waiting for the ranks to save and leave (Ctrl-C leaves the request standing)")
    while (job and slurm.state(job)) or writer.live_holder(run):
        time.sleep(2)
    print(f"stopped; {status.last_checkpoint(run) or 'there is no checkpoint'}")
    return 0


def show(argv: Sequence[str]) -> int:
    """`python -m launch status DIR...`."""
    parser = argparse.ArgumentParser(prog="python -m launch status")
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--watch", action="store_true", help="draw again until Ctrl-C")
    arguments = parser.parse_args(argv)
    if arguments.watch:
        status.watch(arguments.runs)
    else:
        print(status.text(arguments.runs), end="")
    return 0


def check(argv: Sequence[str]) -> int:
    """`python -m launch check`, on every rank of an allocation."""
    from launch import check as checks  # needs torch, which a login node need not have

    return checks.main(argv)


def _job(arguments: argparse.Namespace, *, run: Path, preset: Path) -> Job:
    cluster = load(arguments.cluster) if arguments.cluster else Cluster(launcher="alone")
    changes = tuple(arguments.set)
    snapshot.check_changes(changes)
    return Job(
        run=run.absolute(),
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cluster=cluster,
        directory=Path.cwd(),
        changes=changes,
        absent=tuple(arguments.unset),
        check=arguments.check,
        shards=snapshot.find_shards(preset, changes),
    )


def _submit(job: Job, script: Path) -> int:
    """Hand the text over, or run it here and return its status."""
    if job.cluster.launcher == "kubernetes":
        print(f"written; start it with: kubectl apply -f {script}")
        return 0
    if job.cluster.launcher != "slurm":
        return subprocess.run(["bash", str(script)]).returncode
    number = slurm.submit(script)
    (job.records / "job").write_text(f"{number}\n")
    print(f"submitted {script} as job {number}; its output: {job.records}/slurm-{number}.out")
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1, help="ranks on each node")
    parser.add_argument("--cluster", type=Path, metavar="TOML",
                        help=f"the site's settings (launchers: {', '.join(LAUNCHERS)}); "
                        "without it the run is trained here")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="'training.lr = 1e-4'")
    parser.add_argument("--unset", action="append", default=[], metavar="training.clip")
    parser.add_argument("--check", action="store_true", help="look the nodes over before training")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")


def _start_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    _add_common(parser)
    return parser


def _sweep_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch sweep")
    parser.add_argument("presets", nargs="+", help="a run is made for each, named as it is")
    parser.add_argument("--runs", required=True, type=Path, help="the directory of the runs")
    parser.add_argument("--at-most", type=int, default=1, help="runs at once")
    _add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    verbs = {"status": show, "stop": stop, "sweep": sweep, "check": check}
    verb = verbs.get(words[0]) if words else None
    try:
        return verb(words[1:]) if verb else start(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
