"""The figures of evaluation from features: rows are images, columns features.

As the ADM evaluator defines them (Dhariwal & Nichol 2021, section 2.2): Frechet distance (Heusel
et al. 2017), inception score (Salimans et al. 2016), improved precision and recall (Kynkaanniemi
et al. 2019); beside them the kernel distance (Binkowski et al. 2018), which is unbiased at few
images. All arithmetic is in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# How many rows of one set have their distances to all rows of another in memory at once.
_BLOCK = 2048
# The radius of a row is its distance to the k-th nearest other row, for this k.
_NEIGHBOURS = 3
# Equal rows are apart by up to this share of their squared norm, as distances are computed from
# norms and products. Rows in fp32 that differ are hardly ever closer.
_ROUNDING = 2.0**-44
# Images of a split of the inception score.
SPLIT = 5000
# Subsets of the kernel distance, and their size.
SUBSETS, _SUBSET = 100, 1000


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Moments:
    """Sums over rows, added block by block, from which `Statistics` are computed."""

    def __init__(self, columns: int, *, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        #: Subtracted from each row first: near the mean, so that differences of sums stay exact.
        self.origin = torch.zeros(columns, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.origin)
        self.square = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add features (B, D)."""
        rows = rows.double()
        if not self.count and len(rows):
            self.origin = rows.mean(dim=0)
        rows = rows - self.origin
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.square.addmm_(rows.T, rows)  # without a (D, D) tensor of each block

    def about(self, origin: Tensor) -> "Moments":
        """The same sums about another value (D,)."""
        moved = Moments(len(origin), device=origin.device)
        shift = self.origin - origin
        cross = torch.outer(self.total, shift)
        moved.count, moved.origin = self.count.clone(), origin
        moved.total = self.total + self.count * shift
        moved.square = self.square + cross + cross.T + self.count * torch.outer(shift, shift)
        return moved

    def statistics(self) -> Statistics:
        """Mean, and covariance with division by N - 1, of at least two rows."""
        mean = self.total / self.count
        square = self.square - self.count * torch.outer(mean, mean)
        return Statistics(mean + self.origin, square / (self.count - 1))


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of the rows of all parts, about their mean."""
    count = sum((part.count for part in parts), torch.zeros_like(parts[0].count))
    sums = [part.total + part.count * part.origin for part in parts]
    mean = sum(sums, torch.zeros_like(sums[0])) / count
    whole = Moments(len(mean), device=mean.device)
    whole.count, whole.origin = count, mean
    for part in (part.about(mean) for part in parts):
        whole.total += part.total
        whole.square += part.square
    return whole


def statistics(rows: Tensor) -> Statistics:
    """The statistics of features (N, D), N of 2 or more."""
    moments = Moments(rows.shape[1], device=rows.device)
    for block in rows.split(_BLOCK):
        moments.add(block)
    return moments.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    Exact for covariances of full rank; with singular ones the root of rounding noise adds up to
    about 1e-6 of the traces.
    """
    product = a.root @ b.covariance @ a.root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    return _frechet(a, b, root_trace=eigenvalues.clamp(min=0).sqrt().sum())


def frechet_of_features(x: Tensor, y: Tensor) -> float:
    """The same from features (N, D) and (M, D), also exact with fewer rows than columns.

    tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T / sqrt((N - 1)(M - 1)) of the
    centred features.
    """
    a, b = statistics(x), statistics(y)
    x, y = x.double() - a.mean, y.double() - b.mean
    product = x @ y.T / math.sqrt((len(x) - 1) * (len(y) - 1))
    return _frechet(a, b, root_trace=torch.linalg.svdvals(product).sum())


def _frechet(a: Statistics, b: Statistics, *, root_trace: Tensor) -> float:
    mean = (a.mean - b.mean).square().sum()
    return float(mean + a.covariance.trace() + b.covariance.trace() - 2 * root_trace)


def inception_score(logits: Tensor, *, split: int = SPLIT) -> float:
    """exp E KL(p(y|x) | p(y)) of class scores (N, K), the mean over splits in the rows' order."""
    scores = []
    for rows in logits.double().split(split):
        log_p = F.log_softmax(rows, dim=1)
        log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(rows))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    return sum(scores) / len(scores)


def precision_recall(
    reference: Tensor,
    samples: Tensor,
    *,
    parts: int = 1,
    on_distances: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, float]]:
    """Improved precision and recall, k = 3, of features (M, D) and (N, D).

    Precision is the share of samples inside of the reference set, recall the reverse. A row is
    inside of a set if it is within the `radii` of one of the set's rows.

    After both of all samples come those of each interleaved part, i, i + `parts`, ..., where there
    are several: all are of the same distances, which are computed once. `on_distances` is called
    with their number, in all `distances_needed`.
    """
    reference, samples = reference.double(), samples.double()
    radius = radii(reference, on_distances=on_distances)[0]
    own = radii(samples, parts=parts, on_distances=on_distances)
    sets = [slice(None), *(slice(part, None, parts) for part in range(len(own) - 1))]
    is_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = [0] * len(sets)
    for block, of_block in zip(reference.split(_BLOCK), radius.split(_BLOCK), strict=True):
        distances = _squared_distances(block, samples)
        is_inside |= (distances <= of_block[:, None]).any(dim=0)
        for i, (rows, within) in enumerate(zip(sets, own, strict=True)):
            covered[i] += int((distances[:, rows] <= within).any(dim=1).sum())
        on_distances(distances.numel())
    precisions = [float(is_inside[rows].double().mean()) for rows in sets]
    return [(p, count / len(reference)) for p, count in zip(precisions, covered, strict=True)]


def distances_needed(reference: int, samples: int) -> int:
    """How many distances `precision_recall` computes of so many rows."""
    return reference**2 + samples**2 + reference * samples


def radii(
    rows: Tensor, *, parts: int = 1, on_distances: Callable[[int], None] = lambda _: None
) -> list[Tensor]:
    """Squared distance from each row of (N, D), N above 3, to its third nearest other row, (N,).

    Of several `parts`, as for `precision_recall`, then also those of each part within itself.
    """
    rows = rows.double()
    rounding = rows.square().sum(dim=1) * _ROUNDING  # or an equal row could be outside of radius 0
    whole = rows.new_empty(len(rows))
    within = []
    for part in (slice(i, None, parts) for i in range(parts)):
        far, near = [], []
        for block in rows[part].split(_BLOCK):
            distances = _squared_distances(block, rows)
            far.append(_radii(distances[:, part]))
            near.append(_radii(distances) if parts > 1 else far[-1])
            on_distances(distances.numel())
        whole[part] = torch.cat(near) + rounding[part]
        within.append(torch.cat(far) + rounding[part])
    return [whole, *within] if parts > 1 else [whole]


def _radii(distances: Tensor) -> Tensor:
    """The third smallest distance of each row, without that to the row itself, the smallest."""
    return distances.kthvalue(_NEIGHBOURS + 1, dim=1).values


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return norms.addmm_(a, b.T, alpha=-2).clamp_(min=0)  # one block in memory, not five


def kernel_distance(x: Tensor, y: Tensor, *, on_subset: Callable[[], None] = lambda: None) -> float:
    """The unbiased kernel distance (KID) of features (N, D) and (M, D), with N and M above 1.

    The squared maximum mean discrepancy with the kernel (u.v / D + 1)^3. Its mean over 100 subsets
    of 1000 rows of each set, drawn from a fixed seed, or where there are no more rows, of all.
    `on_subset` is called after each.
    """
    size = min(_SUBSET, len(x), len(y))
    if size == len(x) == len(y):
        return float(_discrepancy(x.double(), y.double()))
    generator = torch.Generator().manual_seed(0)

    def subset(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()

    found = []
    for _ in range(SUBSETS):
        found.append(_discrepancy(subset(x), subset(y)))
        on_subset()
    return float(torch.stack(found).mean())


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    size, columns = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        base = a @ b.T / columns + 1
        return base * base * base

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (size * (size - 1))

    xy = kernel(x, y).mean()
    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * xy
