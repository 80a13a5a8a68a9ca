"""The paper's comparisons at the size of scikit-learn's digits: `python -m bench.paper`.

    python -m bench.paper [--out runs/paper] [--ranks 2] [--images 500]

Trains the networks, draws, evaluates, and writes OUT/table.md, OUT/table.json and pictures, by the
project's own commands. What is done is not done again: the same command resumes. Figures are over
the features of a classifier that is trained here on half of the digits and that no other network
knows; those of photographs over the features of an ImageNet network.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import paper_results
from bench.paper_plan import Plan, Step
from data import files
from data.exits import REFUSED
from data.progress import duration
from data.version import commit
from trainer.ranks.commands import on_ranks


def run(plan: Plan, *, ranks: int) -> int:
    """Do what is left, and write the results; returns the exit status."""
    (plan.out / "samples").mkdir(parents=True, exist_ok=True)
    files.write(plan.out / "ablation.toml", plan.ablation)
    steps = plan.steps()
    left = [step for step in steps if not step.is_done]
    begun, done = time.monotonic(), 0.0
    for i, step in enumerate(left):
        remaining = sum(each.cost for each in left[i:])
        rate = (time.monotonic() - begun) / done if done else 1 / ranks
        number = len(steps) - len(left) + i + 1
        said = f"== {number} of {len(steps)}: {step.name}, about {duration(rate * remaining)} left"
        print(said, flush=True)
        if status := _do(step, plan=plan, ranks=ranks):
            print(f"{step.name!r} ended with {status}: rerun the same command to resume")
            return status
        done += step.cost
    print(paper_results.write(plan, about=_about(plan)), end="")
    return 0


def _do(step: Step, *, plan: Plan, ranks: int) -> int:
    """Run a step and note its seconds; returns its exit status."""
    starts_them = step.command[0] == "trainer.ablate"
    command = on_ranks(step.command, ranks=ranks if step.on_ranks and not starts_them else 1)
    if step.on_ranks and starts_them:
        command += ["--ranks", str(ranks)]
    wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times = plan.out / "times.json"
    known = json.loads(times.read_text()) if times.exists() else []
    took = {"step": step.name, "wall": time.monotonic() - wall, "cpu": cpu, "status": status}
    files.write(times, json.dumps([*known, took], indent=1) + "\n")
    return status


def _about(plan: Plan) -> dict[str, object]:
    """The commit and the machine's seconds, for the saved table."""
    times = json.loads((plan.out / "times.json").read_text())
    return {"commit": commit(), "cpu_seconds": sum(each["cpu"] for each in times), "times": times}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    out = "the directory of everything (default: %(default)s)"
    p.add_argument("--out", type=Path, default=Path("runs/paper"), help=out)
    ranks = "processes that train and draw (default: %(default)s)"
    p.add_argument("--ranks", type=int, default=2, help=ranks)
    images = "images of each sample file (default: %(default)s)"
    p.add_argument("--images", type=int, default=500, help=images)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    plan = Plan(arguments.out, arguments.images)
    if len(str(plan.out).split()) != 1:
        print(f"--out = {plan.out}: must be a name without spaces", file=sys.stderr)
        return REFUSED
    return run(plan, ranks=arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
