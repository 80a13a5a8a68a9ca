"""fp16 loss scaling: when the scale grows, and what a checkpoint keeps of it."""

import sys
from typing import Any

# What a dynamic loss scaler of DeepSpeed's remembers.
_REMEMBERED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """DeepSpeed's loss scaler, whose dynamic scale grows after a step instead of within it.

    DeepSpeed doubles the scale before it divides the gradients by it: one step in each window
    would take its gradients, and in stage 3 report them, at half their size.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self.is_dynamic: bool = scaler.dynamic
        if self.is_dynamic:
            self._window, scaler.scale_window = scaler.scale_window, sys.maxsize
            # The guards decide what happens at the floor; DeepSpeed would end the run.
            scaler.raise_error_at_min_scale = False

    @property
    def scale(self) -> float:
        """The factor on the loss of the next step; 1 where the precision needs none."""
        return float(self._scaler.loss_scale)

    @property
    def can_fall(self) -> bool:
        """Whether gradients that are not finite may be so by the scale alone: it is no incident."""
        return self.is_dynamic and self.scale > self._scaler.min_scale

    def update(self) -> None:
        """Double a dynamic scale after a step that ended a window without overflow.

        Called after every step that was not skipped.
        """
        if not self.is_dynamic:
            return
        scaler = self._scaler
        stable = scaler.cur_iter - 1 - scaler.last_overflow_iter
        if stable > 1 and (stable - 1) % self._window == 0:
            scaler.cur_scale *= scaler.scale_factor
            scaler.cur_hysteresis = scaler.delayed_shift

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing of a constant scale."""
        names = _REMEMBERED if self.is_dynamic else ()
        return {name: getattr(self._scaler, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; a run that changed its precision starts afresh."""
        if self.is_dynamic:
            for name, value in state.items():
                setattr(self._scaler, name, value)
