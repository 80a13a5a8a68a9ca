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
    preemption: Preemption
    watchdog: Watchdog

    def must_leave(self) -> bool:
        """Whether a signal has reached any rank. All ranks must call it."""
        return any(gather(self.preemption.stop_requested))
