"""What the ranks of an allocation report about their machines, and what is wrong with them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Limits: GiB of free disk, at least; seconds by which a clock is off, at most.
LEAST_FREE_GIB, _MOST_SKEW = 10.0, 2.0
# In seconds. A resolver that drops queries takes 5 or more, and stalls steps from 32 ranks on.
_LONGEST_LOOKUP = 1.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank reports about its machine."""

    rank: int
    host: str
    code: str
    versions: str
    gpus: str
    free_gib: float
    #: Seconds to look up the name of this machine's address.
    lookup: float
    #: The error from reading the data or writing the run; empty without one.
    access: str
    #: The error from finding this rank's GPU; empty without one.
    device: str = ""


def problems(
    found: Sequence[Facts],
    *,
    clocks: Mapping[int, tuple[float, float]],
    least_free_gib: float = LEAST_FREE_GIB,
) -> dict[int, str]:
    """What is wrong, by rank; a rank is wrong, too, where it differs from most other ranks.

    `clocks` are by how many seconds those of the ranks are ahead of one of them, at least and at
    most.
    """
    wrong: dict[int, list[str]] = {facts.rank: [] for facts in found}
    for name in ("code", "versions", "gpus"):
        values = [getattr(facts, name) for facts in found]
        usual = max(values, key=values.count)
        for facts in found:
            if (value := getattr(facts, name)) != usual:
                wrong[facts.rank].append(f"{name}: {value}, elsewhere {usual}")
    skews = _skews(clocks)
    for facts in found:
        if abs(skew := skews.get(facts.rank, 0.0)) > _MOST_SKEW:
            wrong[facts.rank].append(f"clock is off by {skew:+.1f} s")
        if facts.free_gib < least_free_gib:
            wrong[facts.rank].append(f"{facts.free_gib:.1f} GiB of disk free")
        if facts.lookup > _LONGEST_LOOKUP:
            wrong[facts.rank].append(
                f"a look-up of an address takes {facts.lookup:.1f} s, and torch makes one for each "
                "connection: correct /etc/resolv.conf, or add the nodes to /etc/hosts"
            )
        wrong[facts.rank] += [error for error in (facts.access, facts.device) if error]
    return {rank: "; ".join(said) for rank, said in wrong.items() if said}


def _skews(clocks: Mapping[int, tuple[float, float]]) -> dict[int, float]:
    """By how many seconds each clock is ahead of most others, as far as that is certain."""
    least, most = (statistics.median_low([c[i] for c in clocks.values()] or [0.0]) for i in (0, 1))
    return {n: max(low - most, 0.0) + min(high - least, 0.0) for n, (low, high) in clocks.items()}


def table(found: Sequence[Facts], *, wrong: Mapping[int, str], missing: Mapping[int, str]) -> str:
    """A row for each rank, those without an answer last; the last column says what is wrong."""
    lines = [f"{'rank':>5}  {'host':12} {'gpus':18} {'free GiB':>8} {'code':8} result"]
    for f in found:
        result = wrong.get(f.rank, "ok")
        lines.append(
            f"{f.rank:5}  {f.host:12} {f.gpus:18} {f.free_gib:8.1f} {f.code[:8]:8} {result}"
        )
    lines += [
        f"{rank:5}  {host:12} {'':18} {'':8} {'':8} no answer" for rank, host in missing.items()
    ]
    return "\n".join(lines)


def speed(mebibytes: int, small: float, large: float, *, ranks: int) -> str:
    """A line with latency and bandwidth, from the seconds of a small and a large all-reduce."""
    # In a ring, each rank sends 2 (N - 1) / N bytes for every byte of the tensor.
    bus = mebibytes / 1024 / large * 2 * (ranks - 1) / ranks
    return f"all-reduce of {ranks} ranks: {small * 1e3:.2f} ms, {bus:.2f} GiB/s"
