"""`make chaos`: a run of two ranks that is killed, filled and damaged at random, and what is left.

    python -m tests.support.chaos [--events 36] [--segments 8] [--seed 0]

However often it was disturbed, the run must end with the weights, averages, moments and losses of
one that nothing disturbed, bit for bit. Where the number of ranks or the ZeRO stage changes, each
segment must agree with the same checkpoint continued otherwise. Nothing may hang.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.support import ranks
from tests.support.points import DAMAGE, POINTS, arm, damage, torchrun
from tests.support.runs import STAGES, STEP, Place, equal

# Steps between checkpoints; at most so many steps lie between two events.
EVERY, REACH, KEPT = 2, 5, 3
# Steps of a run that is over on no machine before an event ends it.
ENDLESS = 10**7
# Seconds without progress after which the watchdog ends a job with a stopped rank.
PATIENCE = 20.0
KEYS = ("loss", "mse", "vb", "grad_norm", "param_norm", "lr")
# Steps for which a segment agrees with one on other ranks, and how well (relative).
SEGMENT, CLOSE = 20, 1e-5

KILLS = ("one rank", "all ranks")
LAUNCHER = "the launcher"
EVENTS = (*POINTS, *KILLS, LAUNCHER, *DAMAGE, "a full disk", "a stopped rank")


def sets(steps: int) -> tuple[str, ...]:
    return (
        f"training.images = {steps * STEP}",
        f"intervals.checkpoint = {EVERY * STEP}",
        f"intervals.keep = {KEPT}",
    )


def train(directory: Path, arguments: list[str], point: str, patience: float) -> int:
    """One rank of a start; it kills itself at `point`."""
    if point:
        arm(point)
    return ranks.work(directory, [arguments], False, patience)


@dataclass
class Chaos:
    """The disturbed run, and the calm one that it is compared with."""

    place: Place
    events: int
    seed: int = 0
    say: Callable[[str], object] = lambda _: None
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._jobs = 0
        #: Of the whole run, once all events are over.
        self.steps = ENDLESS

    @property
    def run(self) -> Path:
        return self.place.run("chaos")

    def checkpoints(self, run: Path) -> list[Path]:
        found = (run / "checkpoints").glob("*") if run.exists() else ()
        return sorted(path for path in found if path.name.isdigit())

    def calm(self) -> None:
        """Train the undisturbed run, as long as the disturbed one."""
        words = self.place.arguments("calm", sets=sets(self.steps))
        assert self.place.train(words, world=2) == [0]

    def disturb(self, kinds: tuple[str, ...] = EVENTS) -> None:
        """Train with `events` disturbances: each kind in turn, in an order of chance."""
        queue: list[str] = []
        while len(self.done) < self.events:
            queue = queue or self._random.sample(kinds, len(kinds))
            kind = queue.pop()
            there = len(self.checkpoints(self.run))
            if (kind in DAMAGE and there < 2) or (kind == "in the pruning" and there < KEPT):
                kind = "all ranks"
            began = time.monotonic()
            self._happen(kind)
            self.done.append(kind)
            last = max([0, *self._rows(self.run)]) // STEP
            seconds = time.monotonic() - began
            self.say(f"{len(self.done):3} {kind}: step {last} ({seconds:.0f} s)")
        self.steps = max(REACH * self.events, last) + EVERY
        assert self.place.train(self._words(), world=2) == [0]

    def check(self) -> None:
        """Compare the two runs."""
        chaos, calm = self._rows(self.run), self._rows(self.place.run("calm"))
        assert list(chaos) == list(calm), f"missing or repeated rows: {set(calm) ^ set(chaos)}"
        for images, row in calm.items():
            assert row == chaos[images], f"losses differ at image {images}"
        ends = [self.checkpoints(run)[-1] for run in (self.run, self.place.run("calm"))]
        assert ends[0].name == ends[1].name
        images = int(ends[0].name)
        same = equal(self.place.checkpoint("chaos", images), self.place.checkpoint("calm", images))
        assert same, "the last checkpoints differ"

    def segments(self, count: int) -> float:
        """Let ranks and stage change; the largest relative difference of a loss."""
        shutil.copytree(self.place.run("calm"), self.place.run("mixed"))
        for path in self.checkpoints(self.place.run("mixed"))[:-1]:
            shutil.rmtree(path)
        worst, layouts = 0.0, [(w, s) for w in (1, 2, 3) for s in STAGES if (w, s) != (2, 2)]
        for number in range(count):
            world, stage = self._random.choice(layouts)
            base = self.checkpoints(self.place.run("mixed"))[-1]
            other = f"otherwise-{number}"
            shutil.copytree(self.place.run("mixed"), self.place.run(other))
            end = int(base.name) + SEGMENT * STEP
            longer = (*sets(0)[1:], f"training.images = {end}")
            words = self.place.arguments("mixed", stage=stage, sets=longer)
            if number % 2 == 0:  # killed at its first checkpoint, and resumed
                job = self._start(words, world=world, point="after the rename")
                self._must_end(job)
                self._end(job)
            self._start(words, world=world).wait()
            assert self.place.train(self.place.arguments(other, sets=longer), world=2) == [0]
            mine, theirs = (self._rows(self.place.run(name)) for name in ("mixed", other))
            later = [images for images in theirs if images > int(base.name)]
            assert len(later) == SEGMENT
            differences = [abs(mine[n][0] - theirs[n][0]) / abs(theirs[n][0]) for n in later]
            worst = max(worst, *differences)
            self.say(f"segment on {world} ranks in stage {stage}: {max(differences):.1e}")
            assert worst < CLOSE
        return worst

    def _happen(self, kind: str) -> None:
        """One start of the run, until `kind` has ended it."""
        if kind == LAUNCHER:
            self._kill_launcher()
            return
        if kind in DAMAGE:
            damage(self.checkpoints(self.run)[-1], kind, chance=self._random)
        point = kind if kind in POINTS else ""
        patience = PATIENCE if kind == "a stopped rank" else ranks.LIMIT
        job = self._start(self._words(), point=point, patience=patience)
        if kind == "all ranks" and self._random.random() < 0.5:
            time.sleep(self._random.uniform(0, 3))  # perhaps before they are connected
        else:
            steps = REACH if point else self._random.randint(1, REACH - 1)
            self._wait(job, steps=steps, run=self.run)
            time.sleep(self._random.uniform(0, 0.05))
        if kind == "a full disk":
            self._fill(job)
        elif kind == "one rank":
            job.signal(self._random.randrange(2), signal.SIGKILL)
            self._must_end(job)
        elif kind == "a stopped rank":
            job.signal(self._random.randrange(2), signal.SIGSTOP)
            self._must_end(job)
        elif point:
            self._must_end(job)
        self._end(job)

    def _kill_launcher(self) -> None:
        """Kill torchrun alone: its ranks must save and leave by themselves."""
        starts, log = self._state().get("starts", 0), self.place.root / "torchrun.txt"
        began = time.time_ns()
        launcher = torchrun(self._words()[1:], log=log)
        self._until(lambda: self._state().get("starts", 0) > starts, log)
        self._until(lambda: self._state()["state"] == "running" and self._rows_are_new(began), log)
        launcher.kill()
        launcher.wait()
        self._until(lambda: self._state()["state"] == "stopped", log)

    def _state(self) -> dict:
        file = self.run / "launch" / "state.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _rows_are_new(self, began: int) -> bool:
        file = self.run / "metrics.jsonl"
        is_new = file.exists() and file.stat().st_mtime_ns > began
        return is_new and max([0, *self._rows(self.run)]) > self._newest()

    def _newest(self) -> int:
        found = self.checkpoints(self.run)
        return int(found[-1].name) if found else 0

    def _until(self, holds: Callable[[], object], log: Path) -> None:
        end = time.monotonic() + ranks.LIMIT
        while not holds():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)

    def _words(self) -> list[str]:
        return self.place.arguments("chaos", sets=sets(self.steps))

    def _start(
        self, words: list[str], *, world: int = 2, point: str = "", patience: float = ranks.LIMIT
    ) -> ranks.Job:
        self._jobs += 1
        directory = self.place.root / f"start-{self._jobs}"
        only = self._random.randrange(world) if point in POINTS[:2] else 0
        task = partial(live, directory, words, point, patience, only)
        return ranks.fork(directory, task, ranks=world)

    def _wait(self, job: ranks.Job, *, steps: int, run: Path) -> None:
        """Wait for so many more steps after the checkpoint, or the end of a rank."""
        before, file = self.checkpoints(run), run / "metrics.jsonl"
        goal = (int(before[-1].name) if before else 0) + steps * STEP
        end = time.monotonic() + ranks.LIMIT
        began = file.stat().st_mtime_ns if file.exists() else 0
        while all(process.is_alive() for process in job.ranks):
            is_written = file.exists() and file.stat().st_mtime_ns != began
            if is_written and max([0, *self._rows(run)]) >= goal:
                return
            assert time.monotonic() < end, f"no progress\n{job.text}"
            time.sleep(0.005)

    def _fill(self, job: ranks.Job) -> None:
        """Let no file grow for a moment."""
        for limit in (0, resource.RLIM_INFINITY):
            for process in job.ranks:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, -1))
            time.sleep(0.5)

    def _must_end(self, job: ranks.Job) -> None:
        """All ranks that are not stopped must end by themselves."""
        end = time.monotonic() + LIMIT
        while any(process.is_alive() and not _is_stopped(process.pid) for process in job.ranks):
            assert time.monotonic() < end, f"a rank hangs\n{job.text}"
            time.sleep(0.05)

    def _end(self, job: ranks.Job) -> None:
        """As a launcher ends what is left of a job."""
        job.kill()
        assert 0 not in [process.exitcode for process in job.ranks], f"ended early\n{job.text}"

    def _rows(self, run: Path) -> dict[int, tuple[float, ...]]:
        """The rows of metrics by images; a row that is being written is left out."""
        file, found = run / "metrics.jsonl", {}
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for row in (json.loads(line) for line in lines if line.endswith("\n")):
            found[row["images"]] = tuple(row[key] for key in KEYS)
        return found


LIMIT = 3 * PATIENCE + 60


def live(directory: Path, words: list[str], point: str, patience: float, only: int) -> int:
    """A rank's life; `only` that one is killed at the point."""
    mine = int(os.environ["RANK"]) == only
    return train(directory, words, point if mine else "", patience)


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except OSError:
        return False


def main() -> int:
    """Run `python -m tests.support.chaos`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos", description=__doc__)
    parser.add_argument("--events", type=int, default=36, help="default: %(default)s")
    parser.add_argument("--segments", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        chaos = Chaos(
            Place.of_digits(Path(scratch)),
            events=options.events,
            seed=options.seed,
            say=partial(print, flush=True),
        )
        chaos.disturb()
        chaos.calm()
        chaos.check()
        print(
            f"{options.events} events: weights, averages, moments and losses are equal, bit for bit"
        )
        worst = chaos.segments(options.segments)
        print(f"{options.segments} segments on other ranks and stages agree to {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
