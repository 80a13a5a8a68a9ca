"""What everything around the bare training step costs, as shares of it, measured in one run.

    python -m bench.overhead [PRESET] [--steps 40] [--set ...] [--deterministic]

Trains a preset of 64-px images on one rank by the trainer's own loop, on photographs that
scikit-learn includes, and times each part of it: the time of a part that another calls counts for
the inner one alone. What happens once an interval is divided by the steps of the preset's own
intervals; a grid and a validation of 10,000 images count by their images. On a CPU the network is
made small (64 channels, 1 block) unless `--set` says otherwise.
`--deterministic` trains a second time with `training.deterministic`, and compares the bare steps.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.photos import make_photos
from data.pack import main as pack
from trainer import train
from trainer.config import experiment as configs
from trainer.config import settings
from trainer.engine import zero as engine
from trainer.loop import Loop
from trainer.measures import Measures
from trainer.ranks.watchdog import Watchdog
from trainer.save_schedule import SaveSchedule
from trainer.saver import Saver
from trainer.watch.metrics import Metrics

WARM_UP = 5
STEP, EMA, METRICS, REPORT = "bare step", "EMA", "metrics", "report, boards and log"
SAVE, DRAW, VALIDATE, WAIT = "checkpoint", "grid", "validation", "waiting for data"
AGREE, WATCH, COMMIT = "agreement of the ranks", "watchdog", "checkpoint's commit"
# Methods that are timed, by part.
PARTS: tuple[tuple[type, str, str], ...] = (
    (Loop, "_step", STEP),
    (SaveSchedule, "agree", AGREE),
    (Loop, "_report", REPORT),
    (SaveSchedule, "save", SAVE),
    (Measures, "_draw_grid", DRAW),
    (Measures, "_validate", VALIDATE),
    (Metrics, "add", METRICS),
    (Metrics, "note", METRICS),
    (Saver, "flush", COMMIT),
)
# Images of a validation, at each checkpoint of the preset.
VALIDATED = 10_000
# The share of a bare step that EMA, metrics, reports and watchdog together may take.
AIM = 0.01


class Meter:
    """The time of each part in each step."""

    def __init__(self) -> None:
        #: Part -> seconds in each step that had it.
        self.steps: dict[str, dict[int, float]] = defaultdict(partial(defaultdict, float))
        self.step = 0
        #: Of the whole training.
        self.seconds = 0.0
        self._inner: list[float] = []

    def timed(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, timed; what it calls of other parts is not counted for it."""

        def run(*arguments: Any, **named: Any) -> Any:
            self.step += part == STEP
            began = _now()
            self._inner.append(0.0)
            try:
                return act(*arguments, **named)
            finally:
                whole = _now() - began
                self.steps[part][self.step] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return run

    def typical(self, part: str) -> float:
        """The median seconds of a step that had it; 0.0 if none had."""
        found = [s for step, s in self.steps[part].items() if step > WARM_UP]
        return statistics.median(found) if found else 0.0


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(arguments: list[str]) -> Meter:
    """Train once, with every part timed. DeepSpeed wants a process for each."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, arguments).result()


def _measure(arguments: list[str]) -> Meter:
    meter = Meter()
    for owner, name, part in PARTS:
        setattr(owner, name, meter.timed(part, getattr(owner, name)))
    attach, to_device = engine.averages.attach, train.to_device

    def attach_timed(optimizer: Any, **named: Any) -> None:
        register = optimizer.register_step_post_hook
        optimizer.register_step_post_hook = lambda hook: register(meter.timed(EMA, hook))
        attach(optimizer, **named)
        optimizer.register_step_post_hook = register

    def batches_timed(*given: Any, **named: Any) -> Iterator[Any]:
        following = meter.timed(WAIT, to_device(*given, **named).__next__)
        while True:
            try:
                yield following()
            except StopIteration:
                return

    setattr(engine.averages, "attach", attach_timed)  # noqa: B010
    setattr(train, "to_device", batches_timed)  # noqa: B010
    for name in ("_exchange_reports", "_watch"):
        setattr(Watchdog, name, _on_thread(meter, getattr(Watchdog, name)))
    began = time.perf_counter()
    assert train.main(arguments) == 0
    meter.seconds = time.perf_counter() - began
    return meter


def _on_thread(meter: Meter, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act` of another thread: the processor's time that it takes."""

    def run(*arguments: Any) -> None:
        began = time.thread_time()
        act(*arguments)
        meter.steps[WATCH][0] += time.thread_time() - began

    return run


def table(meter: Meter, *, preset: configs.Config, small: int) -> list[str]:
    """Each part in milliseconds for a step of `small` images, and as a share of the bare step."""
    step, every, batch = meter.typical(STEP), preset.intervals, preset.training.batch
    watched = meter.steps[WATCH][0] / meter.seconds
    costs = {
        EMA: meter.typical(EMA),
        METRICS: meter.typical(METRICS),
        REPORT: meter.typical(REPORT) * batch / every.log,
        WATCH: watched * step,
        AGREE: meter.typical(AGREE),
        SAVE: (meter.typical(SAVE) + meter.typical(COMMIT)) * batch / every.checkpoint,
    }
    aimed = sum(costs[part] for part in (EMA, METRICS, REPORT, WATCH)) / step
    # These grow with their images, and the step with its own.
    drawn, interval = every.samples_count, every.samples or every.checkpoint
    costs[DRAW] = meter.typical(DRAW) * drawn * small / interval
    costs[VALIDATE] = meter.typical(VALIDATE) * VALIDATED / every.checkpoint
    lines = [f"{STEP:30} {1e3 * step:10.2f} ms"]
    lines += [f"{p:30} {1e3 * s:10.3f} ms {100 * s / step:8.3f} %" for p, s in costs.items()]
    verdict = "within" if aimed <= AIM else "above"
    lines.append(f"EMA, metrics, reports, watchdog: {100 * aimed:.2f} %, {verdict} {100 * AIM:g} %")
    return lines


def _arguments(options: argparse.Namespace, *, work: Path, name: str) -> list[str]:
    """The command line of one training."""
    batch, steps = options.batch, options.steps
    sets = [
        f'data.shards = "{work / "shards"}"',
        f"training.batch = {batch}",
        f"training.micro_batch = {batch}",
        f"training.images = {batch * (WARM_UP + steps)}",
        f"intervals.log = {batch * 5}",
        f"intervals.checkpoint = {batch * (WARM_UP + steps // 3)}",
        f"intervals.samples = {batch * (WARM_UP + steps // 2)}",
        "intervals.samples_count = 1",
        f'data.validation = "{work / "shards"}"',
        f"data.validation_images = {batch}",
        f"intervals.validate = {batch * (WARM_UP + steps // 2)}",
        f"training.deterministic = {'true' if name == 'deterministic' else 'false'}",
    ]
    if not torch.cuda.is_available():
        sets += ["model.channels = 64", "model.blocks = 1", 'training.precision = "fp32"']
    words = [options.preset, "--run", str(work / name)]
    sets = [*settings.without(sets, options.set), *options.set]
    return words + [word for change in sets for word in ("--set", change)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", nargs="?", default="imagenet64", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="as of trainer.train")
    parser.add_argument("--deterministic", action="store_true", help="its cost, too")
    options = parser.parse_args(argv)
    preset = configs.load(options.preset, options.set)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_photos(work / "photos", images=512, classes=1000, longest=160)
        size = str(preset.data.image_size)
        assert pack([str(work / "photos"), str(work / "shards"), "--size", size]) == 0
        meter = measure(_arguments(options, work=work, name="plain"))
        print("\n".join(table(meter, preset=preset, small=options.batch)))
        if options.deterministic:
            other = measure(_arguments(options, work=work, name="deterministic")).typical(STEP)
            ratio = other / meter.typical(STEP)
            print(f"bare step with training.deterministic: {1e3 * other:.2f} ms, {ratio:.3f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
