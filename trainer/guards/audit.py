"""The replay audit: whether a step went wrong by a machine's fault, and by which one.

Every rank compares its weights with the fp32 masters of the ranks that own them, and replays its
own micro-batches and its neighbour's. On sound machines both replays are the same. Where two
differ, all ranks replay that batch and the minority is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.order import share
from data.stream import Batch, to_device
from trainer.engine import compute
from trainer.engine.compute import DTYPES
from trainer.engine.copies import network_of
from trainer.guards.replay import Replay, bound_on, dropout_seed, replay
from trainer.ranks.group import gather
from trainer.ranks.world import host_name
from trainer.start import Parts


@dataclass(frozen=True)
class Finding:
    """What an audit found, the same on all ranks."""

    #: By rank: its own replay of its own micro-batches, and its host.
    replays: tuple[Replay, ...]
    hosts: tuple[str, ...]
    #: What is wrong with the machine of a rank, by rank.
    faults: dict[int, str]

    def described(self) -> str:
        """The faulty ranks and their hosts, in words."""
        said = (f"rank {r} on {self.hosts[r]} {why}" for r, why in self.faults.items())
        return "; ".join(said)


class Audit:
    """Replays micro-batches of a step on their ranks and on neighbours. All ranks call it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        training, engine = parts.config.training, parts.engine
        self._bound = bound_on(engine.device, DTYPES[training.precision])
        self._is_compiled = compute.is_compiled(training, device=engine.device, stage=engine.stage)

    def check(
        self, images_seen: int, *, micro_batches: int, losses: Tensor | None = None
    ) -> Finding:
        """Audit the first micro-batches of the step at `images_seen`, whose weights are still here.

        `losses` (images,), fp32 on the host, are what this rank found in the step itself. Those
        of a compiled step are not compared: it rounds otherwise and has other dropout.
        """
        rank, size = self.parts.world.rank, self.parts.world.size
        faults = blame_weights(gather(self.parts.engine.wrong_weights()))
        own = self._replay(rank, images_seen, micro_batches)
        other = self._replay((rank - 1) % size, images_seen, micro_batches)
        bound = self._bound
        agrees = losses is None or self._is_compiled or own.has_losses(losses, bound=bound)
        everyone = gather((own, other, agrees, host_name()))
        owns = tuple(entry[0] for entry in everyone)
        for number, (_, _, agreed, _) in enumerate(everyone):
            if not agreed:
                faults.setdefault(number, "computed other losses in the step than in its replay")
        for number in range(size):
            neighbour = everyone[(number + 1) % size][1]
            if not owns[number].is_same(neighbour, bound=bound) and not faults:
                faults |= self._vote(number, images_seen, micro_batches, before=owns[number])
        return Finding(owns, tuple(entry[3] for entry in everyone), faults)

    def _vote(
        self, rank: int, images_seen: int, micro_batches: int, *, before: Replay
    ) -> dict[int, str]:
        """Who differs from most ranks in a replay of `rank`'s micro-batches, or from itself."""
        votes = gather(self._replay(rank, images_seen, micro_batches))
        outvoted = minority(votes, bound=self._bound)
        if outvoted:
            return dict.fromkeys(outvoted, "computes other gradients than most ranks")
        itself = before.is_same(votes[rank], bound=self._bound)
        who = (rank + 1) % self.parts.world.size if itself else rank
        return {who: "computed other gradients than in a second replay"}

    def _replay(self, rank: int, images_seen: int, micro_batches: int) -> Replay:
        training, engine = self.parts.config.training, self.parts.engine
        self.parts.mark("replaying a step")
        torch.manual_seed(dropout_seed(training.seed, images_seen, rank))
        with engine.weights() as weights:
            return replay(
                network_of(self.parts.config, weights),
                self.parts.objective,
                to_device(self._batches(rank, images_seen, micro_batches), device=engine.device),
                loss_scale=engine.loss_scale / engine.accumulation,
            )

    def _batches(self, rank: int, images_seen: int, count: int) -> Iterator[Batch]:
        batch, size = self.parts.config.training.batch, self.parts.engine.micro_batch
        mine = share(images_seen, batch_size=batch, rank=rank, ranks=self.parts.world.size)
        for first in range(0, count * size, size):
            yield self.parts.stream.load(mine[first : first + size])


def minority(votes: Sequence[Replay], *, bound: float) -> list[int]:
    """The ranks that no majority agrees with; all that differ, where there is none."""
    agreeing = [sum(vote.is_same(other, bound=bound) for other in votes) for vote in votes]
    return [rank for rank, count in enumerate(agreeing) if 2 * count <= len(votes) != count]


def blame_weights(wrong: Sequence[dict[int, str]]) -> dict[int, str]:
    """Whose weights are not the owners' masters, from what each rank found: owner -> parameter.

    A rank that differs from its own masters is at fault; of the others, those that differ.
    """
    own = {rank for rank, found in enumerate(wrong) if rank in found}
    return {
        rank: f"has other weights than the masters: {next(iter(found.values()))}"
        for rank, found in enumerate(wrong)
        if rank in own or set(found) - own
    }
