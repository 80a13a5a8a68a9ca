"""The flow of a run: batch -> noised batch -> loss -> step -> metrics, and a checkpoint when due.

Everything that varies over a run is a function of the one clock, `images_seen`; what is saved
beside the weights is only what is not.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from data.exits import TO_BE_CONTINUED
from data.progress import Progress, duration
from data.stream import Batch
from trainer.engine import compute
from trainer.evaluation.in_training import Evaluation
from trainer.guards.incidents import Incidents
from trainer.guards.replay import dropout_seed
from trainer.measures import Measures, due
from trainer.run.lease import way_to_resume
from trainer.save_schedule import SaveSchedule
from trainer.saver import Saver
from trainer.seen import learn_timesteps, mean_loss
from trainer.snapshots import Snapshots
from trainer.start import Parts
from trainer.validation import ValidationSet
from trainer.watch.board import Board


@dataclass(kw_only=True)
class Loop(Parts):
    """The parts of a run, the clock that they all follow, and what is done beside the steps."""

    images_seen: int
    saver: Saver
    #: Of the main rank alone, as are the log and the progress line.
    board: Board | None
    #: Whether this rank was told to save and leave, by a signal or by `launch stop`.
    stop_requested: Callable[[], bool]
    #: The images of data.validation, if the config names some.
    validation_set: ValidationSet | None
    #: The figures of samples, if the config asks for them.
    evaluation: Evaluation | None
    #: Hears that a step has ended.
    after_step: Callable[[], None]
    # Whether the next pass compiles the network, for minutes.
    _compiles: bool = field(init=False)
    _saves: SaveSchedule = field(init=False)
    _incidents: Incidents = field(init=False)
    _snapshots: Snapshots = field(init=False)
    _measures: Measures = field(init=False)

    def __post_init__(self) -> None:
        training, engine = self.config.training, self.engine
        self._compiles = compute.is_compiled(training, device=engine.device, stage=engine.stage)
        self._saves = SaveSchedule(parts=self, saver=self.saver, tried_at=self.images_seen)
        self._incidents = Incidents(self, saver=self.saver)
        self._snapshots = Snapshots(self.run, self.config, world=self.world)
        self._measures = Measures(
            parts=self,
            saves=self._saves,
            board=self.board,
            stop_requested=self.stop_requested,
            validation_set=self.validation_set,
            evaluation=self.evaluation,
        )

    def train(self, batches: Iterator[Batch]) -> int:
        """Train to the end, or to a stop that the ranks agree on; the exit status says which.

        `batches` are on the device.
        """
        total, every = self.config.training.images, self.config.intervals
        self._snapshots.open(self.images_seen, parameters=self.engine.parameter_count)
        self._measures.announce()
        progress = Progress(
            total=total,
            done=self.images_seen,
            shown=self.board is not None,
            clock=self.metrics.clock,
        )
        reported, stop = self.images_seen, not self._measures.catch_up(self.images_seen)
        while self.images_seen < total and not stop:
            self._step(batches)
            self.after_step()
            progress.advance(self.config.training.batch)
            stop = self._saves.agree(stop=self.stop_requested(), images_seen=self.images_seen)
            ends = stop or self.images_seen >= total
            norm = None
            if ends or self._due(every.log):
                norm = self._report(progress, since=reported)
                reported = self.images_seen
            if ends or self._saves.is_late or self._due(every.checkpoint):
                self._saves.save(self.images_seen, ends=ends, norm=norm)
            if self._due(every.averages):
                self._keep_averages()
            if not stop and not self._measures.take(self.images_seen):
                stop = True
                if reported < self.images_seen:
                    self._report(progress, since=reported)
                self._saves.save(self.images_seen, ends=True)
            if self._due(every.audit) and not ends and not stop:
                self._audit()
        if self.board is not None:
            self.board.rest(self.metrics.spent, images_seen=self.images_seen)
        self._saves.finish()
        self._end(stopped=stop)
        return TO_BE_CONTINUED if stop else 0

    def _due(self, every: int | None) -> bool:
        batch_size = self.config.training.batch
        return due(every, images_seen=self.images_seen, batch_size=batch_size)

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the images [images_seen, images_seen + batch size)."""
        training = self.config.training
        torch.manual_seed(dropout_seed(training.seed, self.images_seen, self.world.rank))
        seen, waited = [], 0.0
        for _ in range(self.engine.accumulation):
            began = self.metrics.clock()
            self.mark("waiting for data")
            batch = next(batches)
            waited += self.metrics.clock() - began
            self.mark("computing")
            began = self.metrics.clock()
            with self.metrics.forward.running():
                terms = self.objective(self.engine, batch.images, batch.labels, batch.indices)
            if self._compiles:
                self.metrics.pause(began, on="compiling")
                self._compiles = False
            self.engine.backward(terms["loss"].mean())
            self.metrics.note("bad_share", batch.bad, count=len(batch.indices))
            seen.append((batch.indices, terms))
        lr = training.learning_rate(self.images_seen)
        began, self.images_seen = self.images_seen, self.images_seen + training.batch
        report = self.engine.step(
            lr=lr, images_seen=self.images_seen, loss=mean_loss(seen), judge=self.guards.judge
        )
        if report.fault is None:
            learn_timesteps(self.objective.timesteps, seen)
            self.metrics.add(terms for _, terms in seen)
        else:
            to = self._incidents.handle(report, seen, images_seen=began, now=self.images_seen)
            self._saves.went_back()
            if to is not None:
                self._snapshots.set_aside_later(to)
        self.metrics.note("lr", lr)
        self.metrics.note("data_wait_seconds", waited)
        self.metrics.note("skipped", float(report.skipped))
        self.metrics.note("loss_scale", report.loss_scale)
        if not report.skipped:
            self.metrics.note("grad_norm", report.grad_norm)

    def _report(self, progress: Progress, *, since: int) -> float:
        """Show the means of the images since `since`; returns the norm of the weights."""
        images = self.images_seen - since
        norm = self.engine.parameter_norm()
        means = self.metrics.reduce(images=images)
        values = {**means, "param_norm": norm, "skipped_total": float(self.engine.skipped)}
        if "suspended_seconds" in means:
            self.log(f"the job was suspended for {duration(means['suspended_seconds'])}")
        if self.board is not None:
            self.run.note(images_seen=self.images_seen)
            self.board.report(values, images_seen=self.images_seen, slow=self.metrics.slow.text)
        if self.metrics.slow.is_news:
            self.log(f"slow ranks: {self.metrics.slow.text or 'none any more'}")
        self.log(
            f"images {self.images_seen:,} of {self.config.training.images:,}  "
            f"loss {means.get('loss', math.nan):.4f}  {means['images_per_second']:.1f} images/s  "
            f"{progress.left()} left"
        )
        self.guards.check_damaged(means, images=images, log=self.log)
        return norm

    def _keep_averages(self) -> None:
        began = self.metrics.clock()
        self.mark("keeping averages")
        clocks = {"images_seen": self.images_seen, "updated_at": self.engine.updated_at}
        self._snapshots.take(self.engine, **clocks, gaps=self.engine.gaps)
        self.metrics.pause(began, on="averaging")

    def _audit(self) -> None:
        began = self.metrics.clock()
        self._incidents.check(self.images_seen)
        self.metrics.pause(began, on="auditing")

    def _end(self, *, stopped: bool) -> None:
        if self.board is None:
            return
        why = None
        if stopped:
            why = "by `python -m launch stop`" if self.run.stop_requested else "by a signal"
        self.run.note(state="stopped" if stopped else "finished", why=why)
        self.log(f"stopped {why}; {way_to_resume(self.run.path)}" if stopped else "finished")
        for line in self.board.closing():
            self.log(line)
