"""What is done when numbers go wrong: the policy, and its state, which checkpoints keep.

Every rank judges the same numbers, and so decides the same at the same step. A step whose loss or
gradient is not finite, or is far above its running mean, is skipped before anything moves. After
too many in a row the run goes back to a checkpoint, and after too many of those it stops.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from trainer.config import Config
from trainer.ranks.group import Refused

# Images before `data.max_bad` counts as a share: a few early ones say little.
_SEEN_AT_LEAST = 10_000
# The least deviation that is believed, as a share of the mean: no spike is smaller than `spike`
# times this.
_LEAST_DEVIATION = 0.05


@dataclass
class Running:
    """Mean and variance of a quantity over about the last `window` steps that were taken."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def limit(self, factor: float, *, window: int) -> float:
        """The largest value that is no spike; infinite before a window of steps was seen."""
        if self.count < window:
            return math.inf
        deviation = max(math.sqrt(self.variance), _LEAST_DEVIATION * abs(self.mean))
        return self.mean + factor * deviation if deviation else math.inf

    def add(self, value: float, *, window: int) -> None:
        """Take in the value of a step: exact at first, then with weights that decay."""
        self.count = min(self.count + 1, window)
        share, delta = 1 / self.count, value - self.mean
        self.mean += share * delta
        self.variance = (1 - share) * (self.variance + share * delta**2)


class Guards:
    """The limits of one run, and the count of damaged images since this start.

    `row` steps in a row were refused up to now, the first of them at `since`; `incidents` were
    refused in all, and `rollbacks` is how often the run has gone back to a checkpoint.
    """

    def __init__(self, config: Config) -> None:
        self._limits = config.guards
        self._max_bad = config.data.max_bad
        self._batch, self._images = config.training.batch, config.training.images
        #: Receives the count of damaged images.
        self.log: Callable[[str], None] = lambda _: None
        self._seen = self._bad = 0
        self._running = {"loss": Running(), "norm of the gradient": Running()}
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
        for name, running in self._running.items():
            if values[name] > (limit := running.limit(factor, window=window)):
                return (
                    f"the {name} is {values[name]:.4g}, above {limit:.4g}, its mean of "
                    f"{running.mean:.4g} and {factor:g} deviations"
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
            "running": [asdict(running) for running in self._running.values()],
            "row": self.row,
            "since": self.since,
            "incidents": self.incidents,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; a checkpoint of an earlier release has nothing.

        With another batch the running means start afresh: its deviations are others.
        """
        saved = state.get("running", []) if state.get("batch") == self._batch else []
        found = [Running(**entries) for entries in saved] or [Running() for _ in self._running]
        self._running = dict(zip(self._running, found, strict=True))
        self.row, self.since = state.get("row", 0), state.get("since", 0)
        self.incidents, self.rollbacks = state.get("incidents", 0), state.get("rollbacks", 0)

    def check_damaged(self, means: Mapping[str, float], *, images: int) -> None:
        """Judge the damaged images of an interval of so many images.

        Raises:
            Refused: too many images are damaged.
        """
        bad = round(means["bad_share"] * images)
        self._seen += images
        self._bad += bad
        if bad:
            self.log(f"{self._bad:,} of {self._seen:,} images were damaged and replaced")
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
        """Judge the norm of the weights before they are saved.

        Raises:
            Refused: it is not finite.
        """
        if not math.isfinite(norm):
            self.refuse(f"the norm of the weights is {norm}", images_seen=images_seen)

    def refuse(self, why: str, *, images_seen: int) -> NoReturn:
        """End a diverged run.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"the run has diverged after image {images_seen:,}: {why}; {self.incidents} steps were "
            f"skipped and {self.rollbacks} rollbacks made (incidents.jsonl names their images); "
            "its checkpoints are intact: lower training.lr or set training.clip, or raise "
            "guards.spike or guards.rollbacks, and rerun the same command to resume from the last "
            "one"
        )
