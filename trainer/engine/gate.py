"""Between the gradients of a step and its update: whether the step is taken.

DeepSpeed-ZeRO computes the gradient's norm, the same on all ranks, and only then lets the optimizer
move. The gate judges loss and norm there. A step that it refuses ends as DeepSpeed's own skipped
steps do: gradients are dropped, and weights, moments, averages and the loss scale stay.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: From the loss and the norm of the gradient, both of all ranks, to what is wrong with the step.
Judge = Callable[[float, float], str | None]

# What a dynamic loss scaler of DeepSpeed's remembers.
_REMEMBERED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did, the same on all ranks.

    `loss` is the mean of the batch, and `grad_norm` is before clipping.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    #: Why the step was refused; None also where a dynamic loss scale was merely too large.
    fault: str | None


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


class Gate:
    """Stands in DeepSpeed's `optimizer` before its update.

    After a step, `loss` and `grad_norm` are those of all ranks, and `fault` is what the judge said;
    a norm that overflowed at a loss scale that can still fall was not judged, and is infinite.
    """

    def __init__(self, optimizer: Any, *, scaling: LossScale) -> None:
        self._optimizer, self._scaling = optimizer, scaling
        self._device_loss = torch.zeros(())
        self._judge: Judge = lambda loss, norm: None
        self.loss = self.grad_norm = math.nan
        self.fault: str | None = None
        if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda: self._let_pass([norm()])[0]
        else:
            norms = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: self._let_pass(norms())
        self._update_scale = optimizer._update_scale
        optimizer._update_scale = self._update_unless_refused

    def prepare(self, loss: Tensor, judge: Judge) -> None:
        """Ahead of a step: this rank's mean loss, a scalar on its device, and who judges."""
        self._device_loss = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(self._device_loss)
        self._judge, self.fault = judge, None
        self.loss, self.grad_norm = math.nan, math.inf

    def _let_pass(self, scaled: list[Any]) -> list[Tensor]:
        """The norms, on the host: the only wait of a step for the device. Infinite if refused."""
        like = self._device_loss
        found = torch.stack([*(torch.as_tensor(norm).to(like) for norm in scaled), like])
        *norms, self.loss = found.tolist()
        # DeepSpeed says -1 where a norm is not finite.
        whole = all(0 <= norm < math.inf for norm in norms)
        self.grad_norm = math.hypot(*norms) / self._scaling.scale if whole else math.inf
        if whole or not self._may_be_scale():
            self.fault = self._judge(self.loss, self.grad_norm)
        if self.fault is not None or not whole:
            norms = [math.inf] * len(norms)
        return [torch.tensor(norm, dtype=torch.float32) for norm in norms]

    def _may_be_scale(self) -> bool:
        """Whether gradients that are not finite may be so by the loss scale alone."""
        return self._scaling.can_fall and math.isfinite(self.loss)

    def _update_unless_refused(self, overflow: bool = False) -> None:
        if overflow and self.fault is None:  # DeepSpeed may find it ahead of the norm
            self.loss = float(self._device_loss)
            if not self._may_be_scale():
                self.fault = self._judge(self.loss, self.grad_norm)
        if self.fault is None:
            self._update_scale(overflow)
