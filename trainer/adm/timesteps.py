"""Which timestep each training image is noised to, and how its loss is weighted for that.

Draws are keyed by (seed, image index); only the loss-aware sampler has a state, the latest
losses of every timestep, which the trainer gathers from all ranks and saves.
"""

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.adm import keyed


class TimestepSampler(Protocol):
    """Draws timesteps, and may learn from their losses."""

    #: Whether it needs `update`, for which the losses of all ranks are gathered after every step.
    learns: bool

    def draw(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Image indices int64 (B,) -> timesteps int64 (B,), and float32 weights (B,) of losses."""
        ...

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from one step's timesteps (B,) and unweighted losses (B,), in the images' order."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain JSON."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        ...


class UniformTimesteps:
    """Every timestep as often as any other."""

    learns = False

    def __init__(self, steps: int, *, seed: int) -> None:
        self.steps, self.seed = steps, seed

    def draw(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `TimestepSampler.draw`; all weights are 1."""
        u = keyed.uniform(indices, seed=self.seed, stream=keyed.TIMESTEP)
        t = (u * self.steps).long().clamp(max=self.steps - 1)
        return t, torch.ones_like(u)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
        assert not state, "uniform timesteps have no state"


class LossSecondMoment:
    """Timesteps in proportion to the root of the mean square of their latest losses.

    Nichol & Dhariwal 2021, section 3.3: each loss is weighted by 1 / (steps p(t)), so its mean
    stays that of uniform draws. Uniform until every timestep has `history` losses; afterwards
    `uniform_share` of the probability is still spread evenly.
    """

    learns = True

    def __init__(
        self, steps: int, *, seed: int, history: int = 10, uniform_share: float = 0.001
    ) -> None:
        self.steps, self.seed = steps, seed
        self.history, self.uniform_share = history, uniform_share
        self._losses: list[deque[float]] = [deque(maxlen=history) for _ in range(steps)]
        # Running sums of the probabilities, and these: float64 (2, steps), by device.
        self._placed: dict[torch.device, Tensor] = {}

    def draw(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `TimestepSampler.draw`."""
        u = keyed.uniform(indices, seed=self.seed, stream=keyed.TIMESTEP)
        below, probabilities = self._on(u.device)
        t = torch.searchsorted(below, u.double(), right=True).clamp(max=self.steps - 1)
        return t, (1 / (self.steps * probabilities[t])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """As `TimestepSampler.update`."""
        for step, value in zip(t.tolist(), loss.tolist(), strict=True):
            self._losses[step].append(value)
        self._placed = {}

    def state(self) -> dict[str, Any]:
        """The latest losses of every timestep."""
        return {"losses": [list(losses) for losses in self._losses]}

    def load(self, state: dict[str, Any]) -> None:
        """As `TimestepSampler.load`."""
        assert len(state["losses"]) == self.steps, "the history of another number of timesteps"
        self._losses = [deque(losses, maxlen=self.history) for losses in state["losses"]]
        self._placed = {}

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._placed:
            probabilities = self._weigh()
            # The running sum is made on the CPU, so that no device's summation order moves a draw.
            table = torch.stack((probabilities.cumsum(0), probabilities))
            self._placed[device] = table.to(device, non_blocking=True)
        return self._placed[device]

    def _weigh(self) -> Tensor:
        """The probability of every timestep, float64 (steps,)."""
        if any(len(losses) < self.history for losses in self._losses):
            return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        size = torch.tensor(self._losses, dtype=torch.float64).square().mean(1).sqrt()
        return (1 - self.uniform_share) * size / size.sum() + self.uniform_share / self.steps
