"""Features of many images, computed by all ranks and brought together on the main rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.features import FeatureNetwork, Features
from trainer.evaluation.figures import Moments, Statistics, merged
from trainer.progress import Progress
from trainer.ranks.group import agreed, gather, gather_to_main
from trainer.ranks.world import World
from trainer.sampling.samplefile import Samples

# Every figure's spread is that over as many interleaved parts of the images.
PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What figures are computed from, on the main rank.

    Statistics are over all images and, where there are enough, over every `PARTS`-th image from
    the first, the second, ... on.
    """

    count: int
    pool: tuple[Statistics, ...]
    #: Empty where the network has no spatial features.
    spatial: tuple[Statistics, ...]
    #: Features (M, D), and class scores where there are any, of the images that were kept.
    features: Tensor
    logits: Tensor | None


def extract(
    samples: Samples,
    network: FeatureNetwork,
    *,
    kept: Sequence[int],
    world: World,
    device: torch.device,
    batch: int,
) -> Extracted | None:
    """The features of all samples; those of the places `kept` (ascending) one by one.

    All ranks must call it; each takes its share, and the main rank gets the result.

    Raises:
        ValueError: an image is damaged, or its features are not finite.
    """
    mine = agreed(lambda: _own(samples, network, world=world, device=device, batch=batch))
    wanted = set(kept)
    chosen = [row for row, place in enumerate(mine.places) if place in wanted]
    everyone = gather_to_main(
        (
            [mine.places[row] for row in chosen],
            torch.cat(mine.pool)[chosen] if mine.pool else None,
            torch.cat(mine.logits)[chosen] if mine.logits else None,
        )
    )
    pool = _statistics(_reduced(mine.moments, device=device))
    spatial = _statistics(_reduced(mine.spatial_moments, device=device))
    if everyone is None:
        return None
    order = torch.tensor([place for places, *_ in everyone for place in places]).argsort()
    features = torch.cat([part for _, part, _ in everyone if part is not None])
    logits = [part for _, _, part in everyone if part is not None]
    return Extracted(
        count=samples.count,
        pool=pool,
        spatial=spatial,
        features=features[order],
        logits=torch.cat(logits)[order] if logits else None,
    )


class _Own:
    """What one rank has computed."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.pool: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.moments: list[Moments] = []
        self.spatial_moments: list[Moments] = []

    def add(self, first: int, found: Features) -> None:
        """The features of the images from the place `first` on."""
        pool, spatial, logits = found
        self.places += range(first, first + len(pool))
        self.pool.append(pool.cpu())
        if logits is not None:
            self.logits.append(logits.cpu())
        self.moments = self.moments or _new(pool.shape[1], device=pool.device)
        _add(self.moments, pool, first=first)
        if spatial is not None:
            columns = spatial.shape[1]
            self.spatial_moments = self.spatial_moments or _new(columns, device=pool.device)
            _add(self.spatial_moments, spatial, first=first)


def _new(columns: int, *, device: torch.device) -> list[Moments]:
    return [Moments(columns, device=device) for _ in range(PARTS)]


def _add(moments: Sequence[Moments], rows: Tensor, *, first: int) -> None:
    """Add rows of the images from the place `first` on, each to the part that it belongs to."""
    part_of = torch.arange(first, first + len(rows), device=rows.device) % PARTS
    for part, own in enumerate(moments):
        own.add(rows[part_of == part])


def _own(
    samples: Samples, network: FeatureNetwork, *, world: World, device: torch.device, batch: int
) -> _Own:
    own = _Own()
    progress = Progress(total=samples.count, done=0, shown=world.is_main)
    for first in range(world.rank * batch, samples.count, world.size * batch):
        pixels = samples.images(first, min(first + batch, samples.count))
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        with torch.no_grad():
            found = network.compute(images)
        finite = torch.isfinite(found.pool).all(dim=1)
        if not finite.all():
            bad = first + int((~finite).nonzero()[0])
            raise ValueError(f"{samples.path}: the features of image {bad} are not finite")
        own.add(first, found)
        progress.advance(min(batch * world.size, samples.count - first))
    return own


def _reduced(mine: Sequence[Moments], *, device: torch.device) -> list[Moments]:
    """The moments over the rows of all ranks; a rank may have none."""
    columns = max(gather(len(mine[0].origin) if mine else 0))
    if not columns:
        return []
    whole = []
    for own in mine or _new(columns, device=device):
        head = torch.cat([own.count[None], own.total + own.count * own.origin])
        dist.all_reduce(head)
        moved = own.about(head[1:] / head[0].clamp(min=1))
        for tensor in (moved.count, moved.total, moved.square):
            dist.all_reduce(tensor)
        whole.append(moved)
    return whole


def _statistics(parts: Sequence[Moments]) -> tuple[Statistics, ...]:
    """Of the whole, and of each part; none where there is nothing."""
    if not parts:
        return ()
    enough = [part for part in parts if part.count > 1]
    of_parts = enough if len(enough) == PARTS else []
    return (merged(parts).statistics(), *(part.statistics() for part in of_parts))
