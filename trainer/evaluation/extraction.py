"""Features of many images, computed by all ranks and gathered on the main rank."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.figures import Moments, Statistics, merged
from trainer.evaluation.inception import Features
from trainer.ranks.group import gather, gather_to_main

# A figure's standard error is from its values on so many interleaved parts of the images.
PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What figures are computed from, on the main rank.

    `pool` and `spatial` have the statistics of all images and then, if there are enough images,
    those of each of the `PARTS` parts: part i has the images i, i + PARTS, ...
    """

    count: int
    pool: tuple[Statistics, ...]
    #: Empty where the network has no spatial features.
    spatial: tuple[Statistics, ...]
    #: Features (M, D), and class scores where there are any, of the images that were kept.
    features: Tensor
    logits: Tensor | None
    #: How many images equal an earlier one.
    copies: int = 0


def joined(mine: "Share", *, count: int, device: torch.device) -> Extracted | None:
    """Bring together what the ranks have computed of `count` images, on the main rank.

    All ranks must call it.
    """
    everyone = gather_to_main(
        (
            mine.places,
            torch.cat(mine.pool) if mine.pool else None,
            torch.cat(mine.logits) if mine.logits else None,
            mine.digests,
        )
    )
    pool = _statistics(_reduced(mine.moments, device=device))
    spatial = _statistics(_reduced(mine.spatial_moments, device=device))
    if everyone is None:
        return None
    order = torch.tensor([place for places, *_ in everyone for place in places]).argsort()
    features = torch.cat([part for _, part, *_ in everyone if part is not None])
    logits = [part for _, _, part, _ in everyone if part is not None]
    digests = [digest for *_, some in everyone for digest in some]
    return Extracted(
        count=count,
        pool=pool,
        spatial=spatial,
        features=features[order],
        logits=torch.cat(logits)[order] if logits else None,
        copies=len(digests) - len({*digests}),
    )


class Share:
    """What one rank has computed of its images.

    Features and class scores are those of the images at the positions `kept`: of all images of a
    large dataset they would not fit in memory.
    """

    def __init__(self, *, kept: Container[int]) -> None:
        self._kept = kept
        #: The positions of the rows of `pool` and `logits`.
        self.places: list[int] = []
        self.digests: list[bytes] = []
        self.pool: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.moments: list[Moments] = []
        self.spatial_moments: list[Moments] = []

    def add(self, first: int, found: Features, *, images: NDArray[np.uint8] | None = None) -> None:
        """Add the features of n images, whose positions are `first`, `first` + 1, ...

        Where the images (n, H, W, 3) are given, equal ones are counted.
        """
        pool, spatial, logits = found
        given = () if images is None else images
        self.digests += [blake2b(image.tobytes(), digest_size=8).digest() for image in given]
        rows = [row for row in range(len(pool)) if first + row in self._kept]
        self.places += [first + row for row in rows]
        self.pool.append(pool.cpu()[rows])
        if logits is not None:
            self.logits.append(logits.cpu()[rows])
        self.moments = self.moments or _new(pool.shape[1], device=pool.device)
        _add(self.moments, pool, first=first)
        if spatial is not None:
            columns = spatial.shape[1]
            self.spatial_moments = self.spatial_moments or _new(columns, device=pool.device)
            _add(self.spatial_moments, spatial, first=first)


def _new(columns: int, *, device: torch.device) -> list[Moments]:
    return [Moments(columns, device=device) for _ in range(PARTS)]


def _add(moments: Sequence[Moments], rows: Tensor, *, first: int) -> None:
    """Add rows of the images from position `first` on, each to the part that it belongs to."""
    for part, own in enumerate(moments):
        own.add(rows[(part - first) % PARTS :: PARTS])


def _reduced(mine: Sequence[Moments], *, device: torch.device) -> list[Moments]:
    """Each part's moments over the rows of all ranks; a rank may have none."""
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
    """The statistics of all rows, and of each part if all have enough; none without rows."""
    if not parts:
        return ()
    of_parts = parts if all(part.count > 1 for part in parts) else []
    return (merged(parts).statistics(), *(part.statistics() for part in of_parts))
