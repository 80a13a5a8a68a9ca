"""Ablations: `python -m trainer.ablate SET --runs DIR` trains, draws, evaluates and tabulates.

A set is a TOML file: a base preset, and rows that change settings of it. Each row has a run, a
sample file and figures in `DIR/ROW/`; `DIR/table.md` and `table.csv` compare them with the first
row, or with the row that they name, as Tables 1 to 3 of the paper do. What is done is not done
again, so that the same command resumes. `--dry-run` prints what each row would cost.
"""

import argparse
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import files
from data.exits import REFUSED, REPORTED, TO_BE_CONTINUED, CommandParser, exit_status
from trainer import config as configs
from trainer import costs, settings
from trainer.adm.config import check
from trainer.config import Config
from trainer.prediction import operations
from trainer.runstate import RunState

SETS = Path(__file__).parent / "sets"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network or training of a set: the base with changes, written as for `--set`."""

    name: str
    set: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    #: The name of an earlier row that it is compared with. Absent: the first.
    against: str | None = None

    def __post_init__(self) -> None:
        check(bool(self.directory), "rows.name", self.name, "a name with letters or digits")

    @property
    def directory(self) -> str:
        """The name as that of a directory."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is drawn of each row, and what it is compared with."""

    images: int
    steps: str = "250"
    #: As `--reference` and `--network` of `python -m trainer.evaluate`.
    reference: str
    network: str


@dataclass(frozen=True, kw_only=True)
class AblationSet:
    """A set: rows are compared with the first, or with the one that they name."""

    base: str
    #: Changes of every row, written as for `--set`.
    set: tuple[str, ...] = ()
    samples: Samples
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        check(len(self.rows) >= 1, "rows", self.rows, "one or more")
        names = [row.directory for row in self.rows]
        check(len(set(names)) == len(names), "rows.name", names, "different names")
        for i, row in enumerate(self.rows):
            earlier = [each.name for each in self.rows[:i]]
            known = row.against is None or row.against in earlier
            check(known, f"rows.against of {row.name!r}", row.against, "the name of an earlier row")

    def config(self, row: Row) -> Config:
        """The whole config of a row.

        Raises:
            ValueError: a change is wrong; names the row.
        """
        try:
            return configs.load(self.base, (*self.set, *row.set), unset=row.unset)
        except ValueError as error:
            raise ValueError(f"row {row.name!r}: {error}") from None


def load(name: str, overrides: Sequence[str], *, unset: Sequence[str]) -> AblationSet:
    """Read the set of that name in trainer/sets, or that TOML file; every row is checked.

    Raises:
        ValueError: the set, or a row, is wrong.
    """
    path = settings.find(name, directory=SETS)
    found: AblationSet = settings.build(
        AblationSet, settings.read(path, overrides=overrides, unset=unset)
    )
    for row in found.rows:
        found.config(row)
    return found


def plan(found: AblationSet, *, tflops: float, mfu: float) -> Iterator[str]:
    """What each row would cost: parameters, operations, GPU days."""
    yield f"{'row':<32}{'parameters':>14}{'GFLOP/image':>13}{'images':>15}{'GPU days':>10}"
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
        yield f"{row.name:<32}{cells}"
    yield f"{total:,.1f} GPU days of training at {mfu:.0%} of {tflops:g} TFLOP/s"


def run_all(found: AblationSet, runs: Path, *, ranks: int) -> int:
    """Do what is left of every row, and write the table; returns the exit status."""
    runs.mkdir(parents=True, exist_ok=True)
    for row in found.rows:
        _record(found, row, runs=runs)
    for row in found.rows:
        print(f"== {row.name}", flush=True)
        for command in _left(found, row, runs=runs):
            if status := subprocess.run(_on_ranks(command, ranks=ranks), check=False).returncode:
                again = (
                    "rerun the same command to resume" if status == TO_BE_CONTINUED else "failed"
                )
                print(f"row {row.name!r}: {command[0]} ended with {status}: {again}", flush=True)
                return status
        files.write(runs / "table.md", table(found, runs=runs))
        files.write(runs / "table.csv", _as_csv(found, runs=runs))
    print((runs / "table.md").read_text(), end="")
    return 0


def _record(found: AblationSet, row: Row, *, runs: Path) -> None:
    """Keep beside a row's results what they are of.

    Raises:
        ValueError: results are there of a row of that name that was another.
    """
    here, own = runs / row.directory, {**asdict(row), "base": found.base}
    text = json.dumps({**own, "all": found.set, "samples": asdict(found.samples)}, indent=1) + "\n"
    here.mkdir(exist_ok=True)
    file = here / "row.json"
    if file.exists() and file.read_text() != text:
        raise ValueError(
            f"row {row.name!r} was another when {here} was made ({file}): give it another name, "
            "name another --runs directory, or remove that one"
        )
    files.write(file, text)


def _left(found: AblationSet, row: Row, *, runs: Path) -> Iterator[list[str]]:
    """The commands of a row that are still to be run."""
    here, samples = runs / row.directory, found.samples
    run, drawn, figures = here / "run", here / "samples.npz", here / "figures.json"
    changes = [word for change in (*found.set, *row.set) for word in ("--set", change)]
    changes += [word for name in row.unset for word in ("--unset", name)]
    state = RunState.read(run) if run.is_dir() else None
    if state is None or state.state != "finished":
        yield ["trainer.train", found.base, "--run", str(run), *changes]
    if not figures.exists():
        count = ("--images", str(samples.images), "--steps", samples.steps, "--labels", "random")
        yield ["trainer.sample", str(run), "--out", str(drawn), *count]
        against = ("--reference", samples.reference, "--network", samples.network)
        yield ["trainer.evaluate", str(drawn), *against, "--out", str(figures)]


def _on_ranks(command: Sequence[str], *, ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", *command]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *start, "-m", "--", *command]


def _figures(found: AblationSet, *, runs: Path) -> dict[str, dict[str, Any]]:
    """The figures of the rows that have them, by row and name."""
    there = {row.name: runs / row.directory / "figures.json" for row in found.rows}
    return {
        name: json.loads(path.read_text())["figures"]
        for name, path in there.items()
        if path.exists()
    }


def table(found: AblationSet, *, runs: Path) -> str:
    """The rows in Markdown: their figures, or the difference to the row that they are held against.

    Figures' names carry N, the number of samples; ± is the standard error over fourths of them.
    """
    figures = _figures(found, runs=runs)
    names = list(next(iter(figures.values()), {}))
    lines = [f"| {' | '.join(['row', 'against', *names])} |", f"|{'---|' * (2 + len(names))}"]
    first = found.rows[0].name
    bases = {row.against or first for row in found.rows}
    for row in found.rows:
        own = figures.get(row.name)
        against = "" if row.name in bases else (row.against or first)
        base = figures.get(against, {})
        cells = ["not done yet" if own is None else _cell(own.get(n), base.get(n)) for n in names]
        lines.append(f"| {' | '.join([row.name, against, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    errors = [each["error"] for each in (figure, base) if each is not None]
    error = "" if None in errors else f" ± {math.hypot(*errors):.1g}"
    if base is None:
        return f"{figure['value']:.4g}{error}"
    return f"{figure['value'] - base['value']:+.3g}{error}"


def _as_csv(found: AblationSet, *, runs: Path) -> str:
    """The figures themselves, one line for each row and figure."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["row", "figure", "value", "error"])
    for row, figures in _figures(found, runs=runs).items():
        writer.writerows([row, name, f["value"], f["error"]] for name, f in figures.items())
    return out.getvalue()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.ablate", description=__doc__)
    p.add_argument("set_name", metavar="SET", help="a name in trainer/sets, or a .toml file")
    settings.add_overrides(p)
    p.add_argument("--runs", type=Path, help="the directory of all rows (required to run)")
    p.add_argument("--ranks", type=int, default=1, help="processes here (default: %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="print what each row would cost")
    p.add_argument("--tflops", type=float, default=989.0, help="of a GPU (default: %(default)s)")
    share = "share of them that training reaches (default: %(default)s)"
    p.add_argument("--mfu", type=float, default=0.35, help=share)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        found = load(arguments.set_name, arguments.set, unset=arguments.unset)
        check(arguments.ranks >= 1, "--ranks", arguments.ranks, "at least 1")
        check(0 < arguments.mfu <= 1, "--mfu", arguments.mfu, "above 0, at most 1")
        check(arguments.tflops > 0, "--tflops", arguments.tflops, "above 0")
        planned = arguments.dry_run or arguments.runs is not None
        check(planned, "--runs", None, "a directory, or give --dry-run")
        for row in found.rows if not arguments.dry_run else ():
            found.config(row).training.micro_batch_on(arguments.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    if arguments.dry_run:
        print("\n".join(plan(found, tflops=arguments.tflops, mfu=arguments.mfu)))
        return 0
    try:
        return run_all(found, arguments.runs, ranks=arguments.ranks)
    except REPORTED as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())
