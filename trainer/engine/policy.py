"""What is done when numbers go wrong: the policy, and its state, which checkpoints keep.

Every rank judges the same numbers, and so decides the same at the same step. A step whose loss or
gradient is not finite, or is far above its running mean, is skipped before anything moves. After
too many in a row the run goes back to a checkpoint, and after too many of those it stops.

Means and deviations are of logarithms. In a batch of 8, the bound's term of one image with t near 0
can make the loss 30 times its mean, ten deviations, with an ordinary gradient, about once in 1000
steps; so a loss is a spike only where the gradient is unusual too.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from trainer.config.experiment import Config
from trainer.ranks.faults import Refused

# Images before `data.max_bad` counts as a share: a few early ones say little.
_SEEN_AT_LEAST = 10_000
# The least deviation of a logarithm that is believed, about a share of the mean.
_LEAST_DEVIATION = 0.05
# Values below this share of the mean count as so much: 0 has no logarithm.
_LEAST_SHARE = 1e-3
# Deviations above its mean from which a gradient's norm is unusual.
_UNUSUAL = 4.0
# What is judged, in words.
_LOSS, _NORM = "loss", "norm of the gradient"


@dataclass
class Running:
    """Mean and variance of a quantity's logarithm over about the last `window` steps taken."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, mean: float, variance: float, count: int, *, is_log: bool) -> "Running":
        """From a checkpoint; those of earlier releases have moments of the quantity itself."""
        if is_log:
            return cls(mean, variance, count)
        if mean <= 0:
            return cls()
        spread = math.log1p(variance / mean**2)
        return cls(math.log(mean) - spread / 2, spread, count)

    def deviations(self, value: float, *, window: int) -> float:
        """How far a value is above the mean; 0 before a window of steps was seen."""
        if self.count < window:
            return 0.0
        return (self._log(value) - self.mean) / max(math.sqrt(self.variance), _LEAST_DEVIATION)

    def add(self, value: float, *, window: int) -> None:
        """Take in the value of a step: exact at first, then with weights that decay."""
        log = self._log(value)
        self.count = min(self.count + 1, window)
        share, delta = 1 / self.count, log - self.mean
        self.mean += share * delta
        self.variance = (1 - share) * (self.variance + share * delta**2)

    def _log(self, value: float) -> float:
        least = _LEAST_SHARE * math.exp(self.mean) if self.count else sys.float_info.min
        return math.log(max(value, least, sys.float_info.min))


class Guards:
    """The limits of one run, and the count of damaged images since this start.

    `row` steps in a row were refused up to now, the first of them at `since`; `incidents` were
    refused in all, and `rollbacks` is how often the run has gone back to a checkpoint.
    """

    def __init__(self, config: Config) -> None:
        self._limits = config.guards
        self._max_bad = config.data.max_bad
        self._batch, self._images = config.training.batch, config.training.images
        self._seen = self._bad = 0
        self._running = {_LOSS: Running(), _NORM: Running()}
        self.row = self.since = self.incidents = self.rollbacks = 0
        #: The checkpoint of the last rollback of this start, and the clock of the run then.
        self.went_back_to = self.went_back_at = 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step of this mean loss and gradient, or None: the step is taken."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return "the gradients are not finite"
        factor, window = self._limits.spike, self._limits.window
        values = dict(zip(self._running, (loss, grad_norm), strict=True))
        far = {n: r.deviations(values[n], window=window) for n, r in self._running.items()}
        is_unusual = far[_NORM] > min(_UNUSUAL, factor)
        for name, running in self._running.items():
            if far[name] > factor and is_unusual:
                return (
                    f"the {name} is {values[name]:.4g}, {far[name]:.0f} deviations above its mean "
                    f"of {math.exp(running.mean):.4g} on a logarithmic scale"
                )
        for name, running in self._running.items():
            running.add(values[name], window=window)
        self.row = 0
        return None

    def count(self, *, images_seen: int) -> bool:
        """Count a refused step, which began at `images_seen`; whether it is one too many in a row.

        The answer is the same on all ranks.
        """
        if not self.row:
            self.since = images_seen
        self.row += 1
        self.incidents += 1
        return self.row >= self._limits.in_a_row

    @property
    def failing_since(self) -> int | None:
        """The clock since which all steps were refused, if the last one was."""
        return self.since if self.row else None

    def may_roll_back(self) -> bool:
        """Whether the run may go back to a checkpoint once more."""
        return self.rollbacks < self._limits.rollbacks

    def roll_back(self, state: Mapping[str, Any], *, to: int, now: int) -> None:
        """Take back the `state` of a checkpoint, all but what counts over the whole run.

        `to` is its clock, and `now` that of the run.
        """
        self.went_back_to, self.went_back_at = to, now
        incidents, rollbacks = self.incidents, self.rollbacks
        self.load(state)
        self.incidents, self.rollbacks, self.row = incidents, rollbacks + 1, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "batch": self._batch,
            "log_running": [asdict(running) for running in self._running.values()],
            "row": self.row,
            "since": self.since,
            "incidents": self.incidents,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; a checkpoint of an earlier release has nothing.

        With another batch the running means start afresh: its deviations are others.
        """
        is_log = "log_running" in state
        saved = state.get("log_running" if is_log else "running", [])
        found = [Running.of(**entries, is_log=is_log) for entries in saved]
        if not found or state.get("batch") != self._batch:
            found = [Running() for _ in self._running]
        self._running = dict(zip(self._running, found, strict=True))
        self.row, self.since = state.get("row", 0), state.get("since", 0)
        self.incidents, self.rollbacks = state.get("incidents", 0), state.get("rollbacks", 0)

    def check_damaged(
        self, means: Mapping[str, float], *, images: int, log: Callable[[str], None]
    ) -> None:
        """Count the damaged ones of so many images; Refused where they are too many."""
        bad = round(means["bad_share"] * images)
        self._seen += images
        self._bad += bad
        if bad:
            log(f"{self._bad:,} of {self._seen:,} images were damaged and replaced")
        if self._bad > self._max_bad * max(self._seen, _SEEN_AT_LEAST):
            raise Refused(
                f"{self._bad} of {self._seen} images are damaged, more than data.max_bad = "
                f"{self._max_bad}; the lines above name them, and so does "
                "`python -m data.shards verify --full`; to go on, raise data.max_bad and rerun "
                "the same command"
            )

    def may_finish(self, images_seen: int) -> bool:
        """Whether the run ends here, by its number of images, with one skipped step at most.

        Raises:
            Refused: it ends, and more steps in a row were skipped.
        """
        if images_seen < self._images:
            return False
        if self.row > 1:
            self.refuse(f"its last {self.row} steps were skipped", images_seen=images_seen)
        return True

    def check_weights(self, norm: float, *, images_seen: int) -> None:
        """Raise Refused where the norm of the weights, which are to be saved, is not finite."""
        if not math.isfinite(norm):
            self.refuse(f"the norm of the weights is {norm}", images_seen=images_seen)

    def refuse(self, why: str, *, images_seen: int) -> NoReturn:
        """End a diverged run: raise Refused."""
        raise Refused(
            f"the run has diverged after image {images_seen:,}: {why}; {self.incidents} steps were "
            f"skipped and {self.rollbacks} rollbacks made (incidents.jsonl names their images); "
            "its checkpoints are intact: lower training.lr or set training.clip, or raise "
            "guards.spike or guards.rollbacks, and rerun the same command: it resumes from the "
            "last one, if there is any"
        )
