"""The commands that start something: a run, several runs as an array, or sampling."""

import argparse
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from data import files
from launch import options, queue, records, slurm
from launch.cluster import Cluster, load
from launch.job import Job
from launch.shell import quoted
from trainer.ablations import sets as ablations
from trainer.adm.config import check
from trainer.config import ds_config as ds_configs
from trainer.config import experiment as configs
from trainer.config import settings
from trainer.run import origin
from trainer.run.lease import stop_command
from trainer.run.runstate import RunState
from trainer.sampling import options as drawings


def start(argv: Sequence[str], *, description: str | None) -> int:
    """`python -m launch PRESET ...`: submit a run, or start it from here."""
    arguments = options.start(description).parse_args(argv)
    preset = settings.find(arguments.preset, directory=configs.PRESETS)
    changes = {"overrides": tuple(arguments.set), "unset": tuple(arguments.unset)}
    return _begin(_job(arguments, run=arguments.run, preset=preset, **changes), arguments)


def sample(argv: Sequence[str]) -> int:
    """`python -m launch sample ...`: submit trainer.sample, or start it from here."""
    arguments, words = options.sample().parse_known_args(argv)
    out = Path(arguments.out)
    expected = "a file FILE.npz, or a directory with a name"
    check(out.name not in ("", ".."), "--out", arguments.out, expected)
    directory = out.with_suffix("") if out.suffix == ".npz" else out
    words = [*words, "--out", arguments.out]
    run = directory.with_name(f"{directory.name}.job").absolute()
    job = Job(run=run, **_where(arguments), sample=tuple(words))
    if (count := arguments.array) is None:
        check(arguments.at_most == 1, "--at-most", arguments.at_most, "absent without --array")
        _check_drawing(words, array=None)
        return _begin(job, arguments)
    check(count >= 1, "--array", count, "at least 1")
    check(not arguments.detach, "--detach", True, "absent with --array")
    shares = [(f"{n}", (*words, "--share", f"{n}/{count}")) for n in range(count)]
    _check_drawing(words, array=count)
    jobs = [replace(job, run=run / name, sample=share) for name, share in shares]
    return _begin_array(jobs, arguments)


def _check_drawing(words: Sequence[str], *, array: int | None) -> None:
    """Refuse what trainer.sample would refuse of its options, and files that are not there."""
    drawing = drawings.parser("python -m launch sample").parse_args(words)
    for option in ("ranks", "gpus"):
        value = getattr(drawing, option)
        check(value is None, f"--{option}", value, "absent: --nodes and --gpus-per-node say it")
    if array is not None:
        whole = drawing.upsampler is None
        check(whole, "--array", array, "absent with --upsampler, which needs all images")
        check(drawing.share == (0, 1), "--share", drawing.share, "absent with --array")
    drawings.check_options(drawing)
    drawings.check_inputs(drawing)


def _begin(job: Job, arguments: argparse.Namespace) -> int:
    if arguments.detach and job.cluster.launcher in ("slurm", "kubernetes"):
        raise ValueError(f"--detach: launcher = {job.cluster.launcher!r} does not need it")
    text = records.text(job)
    records.check_directory(job.run)
    if arguments.dry_run:
        print(text, end="")
        return 0
    with records.claimed(job.run) as lock:
        records.check_free(job.run)
        records.prepare(job)
        return _submit(job, lock=lock, detach=arguments.detach)


def sweep(argv: Sequence[str]) -> int:
    """`python -m launch sweep PRESETS...`: submit one Slurm array, with a run for each choice."""
    arguments = options.sweep().parse_args(argv)
    if arguments.rows is not None:
        return _sweep_rows(arguments)
    check(bool(arguments.presets), "PRESETS", arguments.presets, "one or more, or give --rows SET")
    presets = [settings.find(preset, directory=configs.PRESETS) for preset in arguments.presets]
    choices = list(_choices(arguments.over))
    runs = [(p, f"{p.stem}{name}", sets) for p in presets for name, sets in choices]
    names = [name for _, name, _ in runs]
    check(len(set(names)) == len(names), "PRESETS", names, "presets of different names")
    fixed, unset = tuple(arguments.set), tuple(arguments.unset)
    jobs = [
        _job(arguments, run=arguments.runs / n, preset=p, overrides=(*fixed, *sets), unset=unset)
        for p, n, sets in runs
    ]
    return _begin_array(jobs, arguments)


def _sweep_rows(arguments: argparse.Namespace) -> int:
    """Submit the rows of a set that are not finished, queued or running."""
    check(not arguments.presets, "PRESETS", arguments.presets, "absent with --rows")
    check(not arguments.over, "--over", arguments.over, "absent with --rows")
    check(arguments.init is None, "--init", arguments.init, "absent with --rows")
    found = ablations.load(arguments.rows, arguments.set, unset=arguments.unset)
    preset = settings.find(found.base, directory=configs.PRESETS)
    jobs = [
        _job(
            arguments,
            run=arguments.runs / row.directory / "run",
            preset=preset,
            overrides=found.changes(row),
            unset=row.unset,
        )
        for row in found.rows
    ]
    return _begin_array(jobs, arguments, extends=False)


def _is_left(job: Job, *, extends: bool, locks: ExitStack | None) -> bool:
    """Whether a job of an array is to be submitted; if not, it says why.

    A finished run is where the command `extends` runs. `locks` takes the run's lock, unless None.
    """
    state = RunState.read(job.run)
    if not extends and state is not None and state.state == "finished":
        print(f"{job.run} is left out: finished")
        return False
    try:
        if locks is not None:
            locks.enter_context(records.claimed(job.run))
        records.check_free(job.run)
    except records.Busy as busy:
        print(f"{job.run} is left out: {busy}")
        return False
    return True


def _begin_array(
    jobs: Sequence[Job], arguments: argparse.Namespace, *, extends: bool = True
) -> int:
    """Submit those jobs, of the same size, that no other job does as one Slurm array."""
    at_most, launcher = arguments.at_most, jobs[0].cluster.launcher
    check(at_most >= 1, "--at-most", at_most, "at least 1")
    check(launcher == "slurm", "launcher", launcher, '"slurm" for an array')
    for job in jobs:
        records.check_directory(job.run)
    with ExitStack() as stack:
        locks = None if arguments.dry_run else stack
        jobs = [job for job in jobs if _is_left(job, extends=extends, locks=locks)]
        if not jobs:
            print("no run is left to be submitted")
            return 0
        text = slurm.array_text(jobs, at_most=at_most)
        if arguments.dry_run:
            print(text, end="")
            return 0
        for job in jobs:
            records.prepare(job)
        script = slurm.directory_of(jobs) / records.SWEEP
        files.write(script, text)
        array = queue.submit(script)
        for index, job in enumerate(jobs):
            records.keep_job_id(job, queue.task(array, index))
    print(
        f"submitted {script} as job array {queue.shown(array)}: {len(jobs)} jobs, {at_most} at once"
    )
    return 0


def _choices(over: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each combination of the values of `--over`: what it adds to a run's name, and its settings.

    Raises:
        ValueError: an option is not a list of different values of one setting.
    """
    spans = [_values(text) for text in over]
    for values in itertools.product(*(values for _, values in spans)):
        chosen = [(n, configs.toml_value(v)) for (n, _), v in zip(spans, values, strict=True)]
        words = [f"-{n.rpartition('.')[2]}{re.sub(r'[^A-Za-z0-9.-]+', '-', v)}" for n, v in chosen]
        yield "".join(words).rstrip("-"), tuple(f"{name} = {value}" for name, value in chosen)


def _values(text: str) -> tuple[str, list[Any]]:
    expected = "one setting with a list of different values, as in 'training.lr = [1e-4, 2e-4]'"
    found: dict[str, Any] = {}
    with suppress(tomllib.TOMLDecodeError):
        found = settings.leaves(tomllib.loads(text))
    check(len(found) == 1, "--over", text, expected)
    ((name, value),) = found.items()
    differ = isinstance(value, list) and value and all(value.count(v) == 1 for v in value)
    check(bool(differ), "--over", text, expected)
    return name, value


def _where(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Where a job runs, and on how much."""
    return {
        "nodes": arguments.nodes,
        "gpus_per_node": arguments.gpus_per_node,
        "cluster": load(arguments.cluster) if arguments.cluster else Cluster(launcher="alone"),
        "directory": Path.cwd(),
    }


def _origin(arguments: argparse.Namespace, *, run: Path) -> Mapping[str, Any]:
    """What the run starts from, which is there. A job that starts again gets the same words."""
    init, wanted = arguments.init, vars(arguments).get("from")
    origin.check_init(init, arguments.init_skip, run=run)
    if wanted is not None and not origin.was_done(run, wanted):
        wanted = origin.find(run, wanted).name
    elif wanted is not None:
        again = f"to go back once more, delete {origin.record_file(run)}"
        print(f"--from {wanted} was done before: the run resumes; {again}", file=sys.stderr)
        wanted = Path(wanted).name
    absolute = None if init is None else init.absolute()
    return {"init": absolute, "init_skip": tuple(arguments.init_skip), "back": wanted}


def _job(
    arguments: argparse.Namespace,
    *,
    run: Path,
    preset: Path,
    overrides: tuple[str, ...],
    unset: tuple[str, ...],
) -> Job:
    """The job of a run. Its whole config has been checked, for its number of ranks."""
    config = configs.load(preset, overrides, unset=unset)
    files.check_text(str(run.absolute()), option="--run")
    job = Job(
        run=run.absolute(),
        **_where(arguments),
        **_origin(arguments, run=run),
        preset=preset,
        overrides=overrides,
        unset=unset,
        check=arguments.check,
        shards=config.data.shards,
        ds_config=arguments.ds_config,
    )
    ds_config = ds_configs.load(job.ds_config or ds_configs.OWN)
    ds_configs.resolve(ds_config, config=config, ranks=job.ranks)
    return job


def _submit(job: Job, *, lock: TextIO, detach: bool) -> int:
    """Submit the script, start it in the background, or become the shell that runs it.

    Such a shell has the run's lock until it ends.
    """
    script = job.script
    if job.cluster.launcher == "kubernetes":
        print(f"wrote {script}; to start it, run: kubectl {quoted(['apply', '-f', script])}")
        return 0
    if job.cluster.launcher == "slurm":
        job_id = queue.submit(script)
        records.keep_job_id(job, job_id)
        output = f"{job.records}/slurm-{job_id.partition(';')[0]}.out"
        print(f"submitted {script} as job {queue.shown(job_id)}; output: {output}")
        return 0
    if detach:
        return _detach(job, lock=lock)
    # On Ctrl-C the ranks save, and a Python parent would kill this shell meanwhile.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and bash could not undo it
        signal.signal(ignored, signal.SIG_DFL)
    os.set_inheritable(lock.fileno(), True)
    os.execvp("bash", ["bash", str(script)])


def _detach(job: Job, *, lock: TextIO) -> int:
    """Start the script in a session of its own, which outlives the terminal."""
    output = job.records / "output.txt"
    with output.open("ab") as file:
        process = subprocess.Popen(
            ["bash", str(job.script)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    where = f"in the background, process {process.pid} of {socket.gethostname()}"
    print(f"started {job.script} {where}")
    print(f"  output: {quoted(['tail', '-F', output])}")
    print(f"  state:  python -m launch {quoted(['status', job.run])}")
    print(f"  stop:   {stop_command(job.run)}")
    return 0
