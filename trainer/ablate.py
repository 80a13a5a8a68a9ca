"""Ablations: `python -m trainer.ablate SET --runs DIR` trains, draws, evaluates and tabulates.

A set is a TOML file: a base preset, and rows that change settings of it. Each row has a run, a
sample file and figures in `DIR/ROW/`; `DIR/table.md`, `table.csv` and `plot.png` compare them with
the first row, or with the row that they name, as Tables 1 to 3 of the paper do, and `DIR/hparams/`
is for TensorBoard's tab HParams. What is done is not done again, so that the same command resumes.
`--dry-run` prints what each row would cost.

With `--cluster FILE` all rows are submitted to train, by `python -m launch sweep`, whose options
may follow; without it, rows that a job trains are not trained here, but drawn and evaluated once
they are finished.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from data import files
from data.config import naming
from data.dataset import open_shards
from data.exits import REFUSED, TO_BE_CONTINUED, CommandParser, reported
from data.stream import open_stream
from trainer.ablations import results as ablation_results
from trainer.ablations import rows as ablation_rows
from trainer.ablations.sets import AblationSet, Row, load
from trainer.adm.config import check
from trainer.config import settings
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.features import DINO, open_network
from trainer.planning import costs
from trainer.planning.prediction import operations
from trainer.ranks.commands import Commands, on_ranks
from trainer.ranks.group import alone
from trainer.ranks.world import launched
from trainer.run.runstate import RunState

# The status of a row that was stopped: the rows after it are not begun.
_STOPPED = -1


def plan(found: AblationSet, *, tflops: float, mfu: float) -> Iterator[str]:
    """What each row would cost: parameters, operations, GPU days."""
    width = 2 + max(len(row.name) for row in found.rows)
    yield f"{'row':<{width}}{'parameters':>14}{'GFLOP/image':>13}{'images':>15}{'GPU days':>10}"
    total = 0.0
    for row in found.rows:
        config = found.config(row)
        net = costs.count(config)
        seconds = config.training.images * operations(config) / (mfu * tflops * 1e12)
        total += seconds / 86400
        cells = (
            f"{net.parameters:>14,}{net.forward_flops / 1e9:>13,.1f}"
            f"{config.training.images:>15,}{seconds / 86400:>10,.1f}"
        )
        yield f"{row.name:<{width}}{cells}"
    yield f"{total:,.1f} GPU days of training at {mfu:.0%} of {tflops:g} TFLOP/s"


def run_all(found: AblationSet, runs: Path, *, ranks: int) -> int:
    """Do what is left of every row, and write the results; returns the exit status.

    After a row that fails, the others are done nevertheless.
    """
    _record(found, runs=runs)
    for row in found.rows:
        ablation_rows.remove_outdated(found, row, runs=runs, say=print)
    statuses = []
    with Commands() as commands:
        for row in found.rows:
            print(f"== {row.name}", flush=True)
            statuses.append(_run_row(found, row, runs=runs, ranks=ranks, commands=commands))
            if statuses[-1] == _STOPPED:
                return TO_BE_CONTINUED
            ablation_results.write(found, runs=runs, say=print)
    print((runs / "table.md").read_text(encoding="utf-8"), end="")
    return next((status for status in statuses if status), 0)


def _check_inputs(found: AblationSet, *, runs: Path) -> None:
    """Check what the rows that are left need: datasets, the reference, and the network.

    Raises:
        ValueError: something is missing or does not fit, for which each row would fail, perhaps
            after days of training.
    """
    left = [
        row
        for row in found.rows
        if not _is_of_a_job(runs / row.directory / "run") and any(_left(found, row, runs=runs))
    ]
    trained = [row for row in left if _state(runs / row.directory / "run") is None]
    for data in dict.fromkeys(found.config(row).data for row in trained):
        open_stream(data, seed=0, check_files=False)
        if data.validation is not None:
            open_shards(data.validation, fetch=data, check_files=False, named="data.validation")
    for name in ("reference", "network") if left else ():
        path = getattr(found.samples, name)
        is_there = Path(path.removeprefix(DINO)).exists()
        check(is_there, f"samples.{name}", path, "a file or directory that is there")
    if left:
        _check_evaluation(found, sides={found.config(row).model.image_size for row in left})


def _check_evaluation(found: AblationSet, *, sides: set[int]) -> None:
    """Raise ValueError unless samples of these sides can be evaluated, tried on black images."""
    samples, cpu = found.samples, torch.device("cpu")
    print("checking samples.network and samples.reference", flush=True)
    try:
        with naming("samples"), alone() as world:
            network = open_network(samples.network, device=cpu)
            evaluator = Evaluator(network=network, world=world, device=cpu, batch_size=64)
            for side in sorted(sides):
                evaluator.check_samples(
                    samples.images, side=side, reference=Path(samples.reference)
                )
    except RuntimeError as error:  # such as an exported program that has a GPU's addresses in it
        said = str(error).partition("\n")[0]
        print(f"samples.network could not be tried on the CPU, so it is not checked: {said}")


def _run_row(found: AblationSet, row: Row, *, runs: Path, ranks: int, commands: Commands) -> int:
    """Do what is left of a row; returns the exit status."""
    run = runs / row.directory / "run"
    if _is_of_a_job(run):
        state = _state(run) or "not started"
        again = "; if its job has ended before, rerun this with --cluster"
        print(f"row {row.name!r}: its job is {state}; rerun this when it is finished{again}")
        return TO_BE_CONTINUED
    for command in _left(found, row, runs=runs):
        before = RunState.read(run)
        status = commands.run(on_ranks(command, ranks=ranks))
        if command[0] == "trainer.train":
            status = ablation_rows.training_status(run, before=before, status=status)
            ablation_rows.remove_outdated(found, row, runs=runs, say=print)
        if status == TO_BE_CONTINUED or (status and commands.stop_requested):
            way = ablation_rows.way_on(run)
            print(f"row {row.name!r}: {command[0]} is stopped; {way}", flush=True)
            return _STOPPED
        if status:
            print(f"row {row.name!r}: {command[0]} ended with {status}: failed", flush=True)
            return status
    return 0


def submit(found: AblationSet, arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Submit the training of the rows that are left; returns the exit status."""
    runs = arguments.runs
    if not arguments.dry_run:
        _record(found, runs=runs)
    words = ["--rows", arguments.set_name, "--runs", str(runs), "--cluster", arguments.cluster]
    words += settings.words(arguments.set, arguments.unset)
    words += ["--dry-run"] * arguments.dry_run
    command = [sys.executable, "-m", "launch", "sweep", *words, *options]
    with Commands() as commands:
        return commands.run(command)


def _is_of_a_job(run: Path) -> bool:
    """Whether the run was submitted as a job and is not finished."""
    return _state(run) != "finished" and (run / "launch" / "job.json").exists()


def _state(run: Path) -> str | None:
    """The state that a run last recorded; None where it has not begun."""
    state = RunState.read(run)
    return None if state is None else state.state


def _record(found: AblationSet, *, runs: Path) -> None:
    """Write `row.json` for every row; ValueError where that of an earlier start differs."""
    of_all = {"base": found.base, "all": found.set, "samples": asdict(found.samples)}
    for row in found.rows:
        text = json.dumps({**asdict(row), **of_all}, indent=1) + "\n"
        here = runs / row.directory
        here.mkdir(parents=True, exist_ok=True)
        file = here / "row.json"
        if file.exists() and file.read_text() != text:
            raise ValueError(
                f"row {row.name!r} was another when {here} was made ({file}): give it another "
                "name, name another --runs directory, or remove that one"
            )
        files.write(file, text)


def _left(found: AblationSet, row: Row, *, runs: Path) -> Iterator[list[str]]:
    """The commands of a row that are still to be run."""
    here, samples = runs / row.directory, found.samples
    run, drawn, figures = here / "run", here / "samples.npz", here / "figures.json"
    if _state(run) != "finished":
        changes = settings.words(found.changes(row), row.unset)
        yield ["trainer.train", found.base, "--run", str(run), *changes]
    if not figures.exists() or ablation_rows.outdated(found, row, runs=runs):
        count = ["--images", str(samples.images), "--steps", samples.steps]
        is_conditional = found.config(row).model.num_classes is not None
        count += ["--labels", "random"] if is_conditional else []
        yield ["trainer.sample", str(run), "--out", str(drawn), *count]
        against = ("--reference", samples.reference, "--network", samples.network)
        yield ["trainer.evaluate", str(drawn), *against, "--out", str(figures)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.ablate", description=__doc__)
    p.add_argument("set_name", metavar="SET", help="a name in trainer/ablations, or a .toml file")
    settings.add_overrides(p, example="samples.images = 2000", left="samples.steps")
    p.add_argument("--runs", type=Path, help="the directory of all rows (required to run)")
    cluster = "submit the training: site settings, as of python -m launch (default: train here)"
    p.add_argument("--cluster", metavar="TOML", help=cluster)
    p.add_argument("--ranks", type=int, default=1, help="processes here (default: %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="print what each row would cost")
    p.add_argument("--tflops", type=float, default=989.0, help="of a GPU (default: %(default)s)")
    share = "share of them that training reaches (default: %(default)s)"
    p.add_argument("--mfu", type=float, default=0.35, help=share)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command = parser()
    arguments, options = command.parse_known_args(argv)
    if options and arguments.cluster is None:
        command.error(f"unrecognized arguments: {' '.join(options)}")
    return reported(lambda: _do(arguments, options))


def _do(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """What the command line asks for."""
    rank, ranks = launched()
    if rank > 0:
        return REFUSED  # process 0 says it
    if ranks > 1:
        said = f"{ranks} processes were started: start it alone; --ranks {ranks} starts the ranks"
        raise ValueError(f"trainer.ablate: {said}")
    found = load(arguments.set_name, arguments.set, unset=arguments.unset)
    check(arguments.ranks >= 1, "--ranks", arguments.ranks, "at least 1")
    here = arguments.cluster is None or arguments.ranks == 1
    check(here, "--ranks", arguments.ranks, "absent with --cluster, whose jobs have their own")
    check(0 < arguments.mfu <= 1, "--mfu", arguments.mfu, "above 0, at most 1")
    check(arguments.tflops > 0, "--tflops", arguments.tflops, "above 0")
    planned = arguments.dry_run and arguments.cluster is None
    check(planned or arguments.runs is not None, "--runs", None, "a directory, or --dry-run")
    if planned:
        print("\n".join(plan(found, tflops=arguments.tflops, mfu=arguments.mfu)))
        return 0
    if arguments.cluster is not None:
        return submit(found, arguments, options)
    for row in found.rows:
        found.config(row).training.micro_batch_on(arguments.ranks)
    _check_inputs(found, runs=arguments.runs)
    return run_all(found, arguments.runs, ranks=arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
