"""What a rank has seen in a step: the indices of its images, and their terms, by micro-batch."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.adm.timesteps import TimestepSampler

#: Micro-batches: image indices (B,), and terms per image (B,) by name.
Seen = Sequence[tuple[Tensor, Mapping[str, Tensor]]]


def mean_loss(seen: Seen) -> Tensor:
    """The mean loss of this rank's images, a scalar; its micro-batches are equally large."""
    return torch.stack([terms["loss"].detach().mean() for _, terms in seen]).mean()


def learn_timesteps(sampler: TimestepSampler, seen: Seen) -> None:
    """Show a sampler that learns the losses of all ranks, in the images' own order."""
    if not sampler.learns:
        return
    columns = [
        torch.cat([indices.double() for indices, _ in seen]),
        torch.cat([terms["t"].double() for _, terms in seen]),
        torch.cat([terms["unweighted"].double() for _, terms in seen]),
    ]
    mine = torch.stack(columns).cpu()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.cat(everyone, dim=1)
    table = table[:, table[0].argsort()]
    sampler.update(table[1].long(), table[2])
