"""The flow of a run: batch -> noised batch -> loss -> step -> metrics, and a checkpoint when due.

Everything that varies over a run is a function of the one clock, `images`; what is saved beside
the weights is only what is not.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.stream import Batch
from launch.exits import TO_BE_CONTINUED
from launch.world import World
from trainer import ema
from trainer.adm.objective import Classify, Denoise
from trainer.checkpoint import Saver
from trainer.config import Config
from trainer.draw import draw_grid
from trainer.engine import Engine
from trainer.group import Agreement, Refused
from trainer.metrics import Board, Metrics, Progress
from trainer.run import Run

#: Images before `data.max_bad` counts as a share: a few early ones say little.
_SEEN_AT_LEAST = 10_000


def due(every: int | None, *, images: int, batch: int) -> bool:
    """Whether the step that ended at clock `images` crossed a multiple of `every`."""
    return every is not None and images // every > (images - batch) // every


@dataclass
class Loop:
    """The parts of a run, and the clock that they all follow."""

    config: Config
    run: Run
    world: World
    engine: Engine
    objective: Denoise | Classify
    saver: Saver
    metrics: Metrics
    #: Of the main rank alone, as are the log and the progress line.
    board: Board | None
    images: int
    #: What makes the order of the data; kept in checkpoints, and checked on resume.
    order: dict[str, Any]
    #: Whether this rank was told to save and leave, by a signal or by `launch stop`.
    told_to_stop: Callable[[], bool]
    #: Tells the watch that this rank has come further, and what it does next.
    mark: Callable[[str], None]
    #: The images that an upsampler enlarges in its grids.
    shown: Batch | None = None
    _agreement: Agreement = field(default_factory=lambda: Agreement(2))
    _was_pending: bool = False
    #: The engine's updates at the last checkpoint, or at this start.
    _saved_updates: int = field(init=False)
    #: Images of all ranks since this start, and those of them that were damaged.
    _seen: int = 0
    _bad: int = 0

    def __post_init__(self) -> None:
        self._saved_updates = self.engine.updates

    def train(self, batches: Iterator[Batch]) -> int:
        """Train to the end, or to a stop that the ranks agree on; the exit status says which.

        `batches` are on the device.
        """
        total, every = self.config.training.images, self.config.intervals
        progress = Progress(total=total, done=self.images, shown=self.board is not None)
        reported, stop = self.images, False
        while self.images < total and not stop:
            self._step(batches)
            progress.advance(self.config.training.batch)
            stop = self._agree(stop=self.told_to_stop())
            ends = stop or self.images >= total
            if ends or self._due(every.log):
                self._report(progress, since=reported)
                reported = self.images
            if ends or self._due(every.checkpoint):
                self._save()
            if self._due(every.samples) and not stop:
                self._draw_grid()
        self._agreement.close()
        if self.saver.pending:
            self._commit()
        self._log("stopped by a signal; the same command goes on" if stop else "finished")
        return TO_BE_CONTINUED if stop else 0

    def _due(self, every: int | None) -> bool:
        return due(every, images=self.images, batch=self.config.training.batch)

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the batch [images, images + batch)."""
        training = self.config.training
        torch.manual_seed(_dropout_seed(training.seed, self.images, self.world.rank))
        seen, waited = [], 0.0
        for _ in range(self.engine.accumulation):
            began = time.monotonic()
            self.mark("waiting for data")
            batch = next(batches)
            waited += time.monotonic() - began
            self.mark("computing")
            terms = self.objective(self.engine, batch.images, batch.labels, batch.numbers)
            self.engine.backward(terms["loss"].mean())
            self.metrics.add(terms)
            self.metrics.put("bad_share", batch.bad, len(batch.numbers))
            seen.append((batch.numbers, terms))
        lr = training.learning_rate(self.images)
        report = self.engine.step(lr=lr)
        if report.diverged is not None:
            self._refuse(report.diverged)
        self._learn_timesteps(seen)
        self.images += training.batch
        self.metrics.note("lr", lr)
        self.metrics.note("data_wait_seconds", waited)
        self.metrics.note("skipped", float(report.skipped))
        self.metrics.note("loss_scale", report.loss_scale)
        if not report.skipped:
            self.metrics.note("grad_norm", report.grad_norm)

    def _learn_timesteps(self, seen: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Show an adaptive timestep sampler the losses of all ranks, in the images' own order."""
        if self.config.training.timesteps == "uniform":
            return
        columns = [
            torch.cat([n.double() for n, _ in seen]),
            torch.cat([terms["t"].double() for _, terms in seen]),
            torch.cat([terms["unweighted"].double() for _, terms in seen]),
        ]
        mine = torch.stack(columns).cpu()
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        table = torch.cat(everyone, dim=1)
        table = table[:, table[0].argsort()]
        self.objective.timesteps.update(table[1].long(), table[2])

    def _agree(self, *, stop: bool) -> bool:
        """Whether any rank wanted to stop at the last step; commits a checkpoint that is whole."""
        watched, self._was_pending = self._was_pending, self.saver.pending
        stop, writing = self._agreement.exchange(stop, self.saver.writing)
        if watched and not writing:
            self._commit()
        return stop

    def _report(self, progress: Progress, *, since: int) -> None:
        images = self.images - since
        norm = self.engine.parameter_norm()
        means = self.metrics.reduce(images=images)
        values = {**means, "param_norm": norm, "skipped_total": float(self.engine.skipped)}
        if self.board is not None:
            self.run.check_writer()
            self.board.scalars(values, images=self.images)
        self._log(
            f"images {self.images:,} of {self.config.training.images:,}  "
            f"loss {means['loss']:.4f}  {means['images_per_second']:.1f} images/s  "
            f"{progress.left()} left"
        )
        if not means["skipped"] and not math.isfinite(means["loss"]):
            self._refuse(f"the loss is {means['loss']}")
        self._judge_data(images, bad=round(means["bad_share"] * images))

    def _judge_data(self, images: int, *, bad: int) -> None:
        """Stop where more than the allowed share of all ranks' images had to be replaced."""
        self._seen += images
        self._bad += bad
        if bad:
            self._log(f"{self._bad:,} of {self._seen:,} images were damaged and replaced")
        if self._bad > self.config.data.max_bad * max(self._seen, _SEEN_AT_LEAST):
            raise Refused(
                f"{self._bad} of {self._seen} images are damaged, more than data.max_bad = "
                f"{self.config.data.max_bad}; the lines above name them, and so does "
                "`python -m data.shards verify --full`; with a larger data.max_bad the same "
                "command goes on"
            )

    def _save(self) -> None:
        if self.saver.pending:
            self._commit()
        if self.engine.updates == self._saved_updates:
            self._pass_over_save()
            return
        self.mark("saving")
        if not math.isfinite(norm := self.engine.parameter_norm()):
            self._refuse(f"the norm of the weights is {norm}")
        began = time.monotonic()
        state = {
            "engine": self.engine.scalars(),
            "timesteps": self.objective.timesteps.state(),
            "order": self.order,
            "ranks": self.world.size,
            "torch": torch.__version__,
        }
        self.saver.save(self.engine, images=self.images, state=state)
        self._saved_updates = self.engine.updates
        self._was_pending = False
        self.metrics.pause(time.monotonic() - began)

    def _pass_over_save(self) -> None:
        """Write no checkpoint of weights that are saved already: it would push out a good one."""
        if self.images >= self.config.training.images:
            self._refuse("every step since the last checkpoint was skipped")
        self._log("every step since the last checkpoint was skipped: none is written")

    def _commit(self) -> None:
        path = self.saver.commit()
        self._was_pending = False
        self._log(f"checkpoint {path.name} committed")

    def _refuse(self, why: str) -> None:
        raise Refused(
            f"the run has diverged after image {self.images:,}: {why}; its checkpoints are intact: "
            "lower training.lr or set training.clip, and rerun the same command to resume from "
            "the last one"
        )

    def _draw_grid(self) -> None:
        """A grid from the first EMA; every rank draws its share of the images."""
        if self.saver.pending:  # whatever becomes of the grid, the checkpoint stands
            self._commit()
        began = time.monotonic()
        picture = draw_grid(
            self.engine.gather(ema.key(self.config.training.ema[0])),
            config=self.config,
            world=self.world,
            device=self.engine.device,
            shown=self.shown,
            on_step=lambda: self.mark("drawing samples"),
        )
        if self.board is not None and picture is not None:
            name = f"{self.images:012d}"
            self.board.grid("samples", torch.from_numpy(picture), images=self.images)
            self.run.picture(name, picture)
        self.metrics.pause(time.monotonic() - began)

    def _log(self, text: str) -> None:
        if self.board is not None:
            self.run.log(text)


def _dropout_seed(seed: int, images: int, rank: int) -> int:
    """Dropout is keyed by (seed, clock, rank): exact on resume, not across numbers of ranks."""
    return int(np.random.SeedSequence([seed, images, rank]).generate_state(1, np.uint64)[0] >> 1)
