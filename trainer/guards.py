"""Checks that end a run: diverging gradients, losses or weights, and damaged data.

Every rank judges the same numbers, and so raises at the same step. Each check is made before the
state that it judges is saved.
"""

import math
from collections.abc import Callable, Mapping

from trainer.config import Config
from trainer.engine import StepReport
from trainer.ranks.group import Refused

# Images before `data.max_bad` counts as a share: a few early ones say little.
_SEEN_AT_LEAST = 10_000


class Guards:
    """The limits of one run, and the count of damaged images since this start."""

    def __init__(self, config: Config, *, log: Callable[[str], None]) -> None:
        self._max_bad = config.data.max_bad
        self._log = log
        self._seen = self._bad = 0

    def check_step(self, report: StepReport, *, images_seen: int) -> None:
        """End the run after a step whose gradients will not become finite again.

        Raises:
            Refused: its gradients are not finite, and a smaller loss scale cannot help.
        """
        if report.diverged is not None:
            self.refuse(report.diverged, images_seen=images_seen)

    def check_interval(self, means: Mapping[str, float], *, images_seen: int, images: int) -> None:
        """Judge the means of an interval of so many images.

        Raises:
            Refused: the loss is not finite, or too many images are damaged.
        """
        if not means["skipped"] and not math.isfinite(means["loss"]):
            self.refuse(f"the loss is {means['loss']}", images_seen=images_seen)
        self._count_damaged(images, bad=round(means["bad_share"] * images))

    def check_weights(self, norm: float, *, images_seen: int) -> None:
        """Judge the norm of the weights before they are saved.

        Raises:
            Refused: it is not finite.
        """
        if not math.isfinite(norm):
            self.refuse(f"the norm of the weights is {norm}", images_seen=images_seen)

    def refuse(self, why: str, *, images_seen: int) -> None:
        """End a diverged run.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"the run has diverged after image {images_seen:,}: {why}; its checkpoints are intact: "
            "lower training.lr or set training.clip, and rerun the same command to resume from "
            "the last one"
        )

    def _count_damaged(self, images: int, *, bad: int) -> None:
        self._seen += images
        self._bad += bad
        if bad:
            self._log(f"{self._bad:,} of {self._seen:,} images were damaged and replaced")
        if self._bad > self._max_bad * max(self._seen, _SEEN_AT_LEAST):
            raise Refused(
                f"{self._bad} of {self._seen} images are damaged, more than data.max_bad = "
                f"{self._max_bad}; the lines above name them, and so does "
                "`python -m data.shards verify --full`; to go on, raise data.max_bad and rerun "
                "the same command"
            )
