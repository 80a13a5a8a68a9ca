"""When a run is saved: at its intervals, by time, at its end; but while steps fail at a stop alone.

`saver.py` writes; this decides, the same on all ranks.
"""

import time
from dataclasses import dataclass, field

from trainer import common
from trainer.config import experiment as configs
from trainer.ranks.group import Agreement, from_main
from trainer.run.trainstate import TrainState
from trainer.saver import Saver
from trainer.start import Parts


@dataclass(kw_only=True)
class SaveSchedule:
    """What is saved, and when that was done last. All ranks make each call together."""

    parts: Parts
    saver: Saver
    #: The clock at the last save that was tried, or at this start.
    tried_at: int
    #: Whether a checkpoint is late by `intervals.checkpoint_minutes`, or waits for a good step.
    is_late: bool = field(init=False, default=False)
    _saved_at: float = field(init=False, default_factory=time.monotonic)
    # The engine's updates at the last save that began, and at the one before, or this start.
    _updates: tuple[int, int] = field(init=False)
    _waits: bool = field(init=False, default=False)
    _agreement: Agreement = field(init=False, default_factory=lambda: Agreement(3))

    def __post_init__(self) -> None:
        self._updates = (self.parts.engine.updates,) * 2

    def agree(self, *, stop: bool, images_seen: int) -> bool:
        """Whether any rank wanted to `stop` at the last step, or found a checkpoint late.

        Commits a checkpoint that is whole.
        """
        minutes = self.parts.config.intervals.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        stop, writing, late = self._agreement.exchange(stop, self.saver.flag(), late)
        self.saver.poll(writing=writing, failing_since=self.parts.guards.failing_since)
        # A rank that raised it ahead of the last save is known after it.
        is_new = images_seen > self.tried_at + self.parts.config.training.batch
        self.is_late = self._waits or (late and is_new)
        return stop

    def save(self, images_seen: int, *, ends: bool, norm: float | None = None) -> None:
        """Save, unless that waits for a good step; `ends` says that no step follows.

        At a stop among steps that fail it does not wait: the weights are those of the last good
        step, and older checkpoints stay for a rollback. `norm` is that of the weights, where it is
        known already.
        """
        parts, engine, guards = self.parts, self.parts.engine, self.parts.guards
        self._waits = bool(guards.row) and not guards.may_finish(images_seen)
        if self._waits and not ends:
            return
        began = parts.metrics.clock()
        parts.mark("saving")
        self.saver.flush(failing_since=guards.failing_since if self._waits else None)
        before, self.tried_at, self._saved_at = self.tried_at, images_seen, time.monotonic()
        is_saved = engine.updates == self._saved
        if is_saved and (images_seen == before or self._passes_over(images_seen)):
            return
        from_main(parts.stream.check_unchanged)
        norm = engine.parameter_norm() if norm is None else norm
        guards.check_weights(norm, images_seen=images_seen)
        state = TrainState(
            images_seen=images_seen,
            engine=engine.scalars(),
            timesteps=parts.objective.timesteps.state(),
            guards=guards.state(),
            order=parts.stream.identity,
            config=configs.to_toml(configs.public(parts.config)),
            ranks=parts.world.size,
            software=common.running(),
        )
        self._updates = engine.updates, self._saved
        self.saver.save(engine, state=state, prunes=not self._waits, ends=ends)
        parts.metrics.pause(began, on="saving")

    def protect(self) -> None:
        """Commit what is being written, ahead of work that may fail; nothing while steps fail."""
        if not self.parts.guards.row:
            began = self.parts.metrics.clock()
            self.parts.mark("saving")
            self.saver.flush()
            self.parts.metrics.pause(began, on="saving")

    def went_back(self) -> None:
        """The guards may have taken updates back, to the last checkpoint at most."""
        last, before = self._updates
        updates = self.parts.engine.updates
        self._updates = min(last, updates), min(before, updates)

    def finish(self) -> None:
        """End the exchange with the other ranks, and commit what is still being written."""
        self._agreement.close()
        self.saver.finish()

    @property
    def _saved(self) -> int:
        """The engine's updates at the newest checkpoint that is written, or on its way."""
        last, before = self._updates
        return before if self.saver.is_lost else last

    def _passes_over(self, images_seen: int) -> bool:
        """Whether to write no checkpoint of weights that are saved already.

        It would push out a good one. At the end of a run it is written: its last steps may have
        been skipped for the loss scale alone.
        """
        why = "every step since the last checkpoint was skipped"
        if images_seen < self.parts.config.training.images:
            self.parts.log(f"{why}: none is written")
            return True
        if not self.parts.engine.updates:
            self.parts.guards.refuse(why, images_seen=images_seen)
        return False
