"""One rank's identity, device, signals and watchdog, passed down from the command."""

from dataclasses import dataclass

import torch

from trainer.ranks.group import gather
from trainer.ranks.signals import Preemption
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import World


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """This rank's identity, device, signals and watchdog."""

    world: World
    device: torch.device
    watchdog: Watchdog
    #: None for a command that a signal ends at once.
    preemption: Preemption | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has reached this rank."""
        return self.preemption is not None and self.preemption.stop_requested

    def must_leave(self) -> bool:
        """Whether a signal has reached any rank. All ranks must call it."""
        return any(gather(self.stop_requested))
