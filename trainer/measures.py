"""What is measured of a run beside its steps: validation, grids, and the figures of samples.

Each is taken when the clock crosses a multiple of its interval. A stop interrupts them: the run is
then saved where it is, and the next start first takes what is missing there, except for grids.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from data.stream import Batch
from data.transforms import png
from trainer.config.experiment import Config
from trainer.engine import averages
from trainer.evaluation import in_training
from trainer.evaluation.in_training import Evaluation
from trainer.ranks.group import from_main, until_stopped
from trainer.run import history
from trainer.run.directory import Run
from trainer.sampling.draw import draw_grid, grid_originals
from trainer.save_schedule import SaveSchedule
from trainer.start import Parts
from trainer.validation import Validation, ValidationSet
from trainer.watch.board import Board


def due(every: int | None, *, images_seen: int, batch_size: int) -> bool:
    """Whether the step that ended at `images_seen` crossed a multiple of `every`."""
    return every is not None and images_seen // every > (images_seen - batch_size) // every


def missing(run: Run, config: Config, *, images_seen: int) -> set[str]:
    """The groups of metrics that are due at the clock where a start begins, but not recorded.

    Grids are not considered. All ranks must call it.
    """
    every = {"validation": config.intervals.validate, in_training.GROUP: config.intervals.evaluate}
    at = {"images_seen": images_seen, "batch_size": config.training.batch}
    wanted = {group for group, n in every.items() if images_seen and due(n, **at)}

    def there() -> set[str]:
        rows = [row for row in history.read(run.path) if row["images"] == images_seen]
        return {name.partition("/")[0] for row in rows for name in row if "/" in name}

    return wanted - from_main(there)


@dataclass(kw_only=True)
class Measures:
    """Takes a run's measurements. All ranks make each call together."""

    parts: Parts
    saves: SaveSchedule
    #: Of the main rank alone.
    board: Board | None
    stop_requested: Callable[[], bool]
    validation_set: ValidationSet | None
    evaluation: Evaluation | None
    validation: Validation | None = field(init=False, default=None)
    # The images whose low resolution an upsampler enlarges in its grids.
    _originals: Batch | None = field(init=False)

    def __post_init__(self) -> None:
        config, world = self.parts.config, self.parts.world
        if self.validation_set is not None:
            self.validation = Validation(self.validation_set, config=config, world=world)
        self._originals = grid_originals(config, self.parts.stream, world=world)

    def announce(self) -> None:
        """Log what validation and evaluation cost."""
        for each in (self.validation, self.evaluation):
            if each is not None:
                self.parts.log(each.cost())

    def take(self, images_seen: int) -> bool:
        """Take what is due; False if a stop interrupted it."""
        every, batch_size = self.parts.config.intervals, self.parts.config.training.batch
        is_due = partial(due, images_seen=images_seen, batch_size=batch_size)
        return (
            (not is_due(every.validate) or self._validate(images_seen))
            and (not is_due(every.samples) or self._draw_grid(images_seen))
            and (not is_due(every.evaluate) or self._evaluate(images_seen))
        )

    def catch_up(self, images_seen: int) -> bool:
        """Take what an earlier start left out at this clock; False if a stop interrupted it."""
        left = missing(self.parts.run, self.parts.config, images_seen=images_seen)
        return ("validation" not in left or self._validate(images_seen)) and (
            in_training.GROUP not in left or self._evaluate(images_seen)
        )

    def _begin(self, doing: str) -> float:
        """Finish a checkpoint that is being written, and tell the watchdog; returns the time."""
        self.saves.protect()
        self.parts.mark(doing)
        return self.parts.metrics.clock()

    def _validate(self, images_seen: int) -> bool:
        """Compute the loss over data.validation, with the first EMA and with the weights."""
        parts = self.parts
        assert self.validation is not None
        began = self._begin("validating")
        found = self.validation.measure(parts.engine, mark=parts.mark, stopped=self.stop_requested)
        seconds = parts.metrics.clock() - began
        if self.board is not None and found is not None:
            self.validation.note(found, parts.run, images_seen=images_seen)
            self.board.values(found, images_seen=images_seen)
        parts.log(self.validation.describe(found, seconds=seconds))
        parts.metrics.pause(began, on="validating")
        return found is not None

    def _draw_grid(self, images_seen: int) -> bool:
        """Draw a grid of samples from the first EMA; every rank draws its share."""
        parts = self.parts
        began, picture, is_done = self._begin("drawing samples"), None, False
        kind = averages.exponential(parts.config.training.ema[0])
        with parts.engine.weights(kind) as averaged, until_stopped(self.stop_requested) as check:

            def on_step() -> None:
                parts.mark("drawing samples")
                check()

            picture = draw_grid(
                averaged,
                config=parts.config,
                world=parts.world,
                originals=self._originals,
                on_step=on_step,
            )
            is_done = True
        if not is_done:
            parts.log(f"the grid of image {images_seen:,} was interrupted and is left out")
        if self.board is not None and picture is not None:
            self.board.picture("samples", torch.from_numpy(picture), images_seen=images_seen)
            file = parts.run.samples / f"{images_seen:012d}.png"
            parts.run.keep(file, png(picture.transpose(1, 2, 0)))
        parts.metrics.pause(began, on="drawing")
        return is_done

    def _evaluate(self, images_seen: int) -> bool:
        """Compute FID and the other figures of samples from the first EMA."""
        parts = self.parts
        assert self.evaluation is not None
        began = self._begin("drawing samples to evaluate")
        parts.log(f"evaluation: drawing {parts.config.evaluation.images:,} samples")
        found = self.evaluation.measure(
            parts.engine,
            mark=parts.mark,
            stopped=self.stop_requested,
            about={"run": str(parts.run.path), "images_seen": images_seen},
        )
        seconds = parts.metrics.clock() - began
        if self.board is not None and found is not None:
            values = {f"{in_training.GROUP}/{n}": f.value for n, f in found.figures.items()}
            self.board.values(values, images_seen=images_seen)
            parts.run.keep(parts.run.evaluations / f"{images_seen:012d}.json", found.to_json())
        count = parts.config.evaluation.images
        for line in in_training.describe(found, count=count, seconds=seconds):
            parts.log(line)
        parts.metrics.pause(began, on="evaluating")
        return found is not None
