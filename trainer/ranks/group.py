"""What the ranks do together: agree before they act, exchange Python objects.

No rank decides alone on a signal, a checkpoint or an error. A rank that fails exits soon, so that
the launcher ends the others and its message is the first.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from data.exits import is_ours
from trainer.ranks.faults import Fault, StoppedError, raise_any
from trainer.ranks.world import World

T = TypeVar("T")


@contextmanager
def alone() -> Iterator[World]:
    """A group of this process while entered, for what ranks do together on CPUs.

    Nothing in its environment says so to the processes that it starts.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World()
    finally:
        dist.destroy_process_group()


def agreed(check: Callable[[], T]) -> T:
    """The result of `check` on this rank, once it has succeeded on every rank.

    Raises:
        Refused: on every rank, with the faults of all ranks; one common to all is reported once.
        Broken: the same, where a disk or another machine is at fault.
    """
    results: list[T] = []
    mine = None
    try:
        results.append(check())
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not is_ours(error):
            raise
        mine = Fault.of(error)
    raise_any(gather(mine))
    return results[0]


def gather(mine: T) -> list[T]:
    """What every rank has, in the order of the ranks. All ranks must call it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def writers(names: Sequence[str], world: World) -> list[tuple[str, int]]:
    """Each file's name with the rank that writes it. All ranks must call it."""
    # The first ranks of all nodes come first, so that nodes share the gathering and the writing.
    order = sorted(range(world.size), key=gather(world.local_rank).__getitem__)
    return list(zip(names, itertools.cycle(order), strict=False))


def gather_to_main(mine: T) -> list[T] | None:
    """What every rank has, in the order of the ranks, on the main rank. All ranks must call it."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return everyone


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main rank, which alone calls it. All ranks must call this.

    Raises:
        Refused, Broken: on every rank, if `make` raises ValueError or OSError.
    """
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except (ValueError, OSError) as error:
            made[1] = Fault.of(error)
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1].alike()
    result: T = made[0]
    return result


def broadcast(tensor: Tensor) -> None:
    """Give every rank the main rank's values of a tensor. All ranks must call it."""
    dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # gloo has no bfloat16 everywhere


class Turns:
    """0, 1, 2, ...: each number goes to one rank, to whichever asks first.

    All ranks must make one together.
    """

    _made = itertools.count()

    def __init__(self) -> None:
        self._store = distributed_c10d._get_default_store()
        self._name = f"turns-{next(self._made)}"

    def take(self) -> int:
        """The next number."""
        return int(self._store.add(self._name, 1)) - 1

    def taken(self) -> int:
        """How many numbers have been taken."""
        return int(self._store.add(self._name, 0))

    def end(self) -> None:
        """Let every rank's next number be beyond any count, so that all stop."""
        self._store.add(self._name, 2**48)


def all_come(*, within: float = 10.0) -> bool:
    """Whether every rank calls this in so many seconds. It waits in no collective."""
    turns, end = Turns(), time.monotonic() + within
    with suppress(dist.DistError):  # the main rank has seen all, and has ended
        turns.take()
        while turns.taken() < dist.get_world_size():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    return True


class Agreement:
    """Flags that any rank may raise, known to all ranks one step later.

    The exchange runs beside the next step and needs only the host, so no rank waits for a GPU.
    """

    def __init__(self, count: int) -> None:
        self._flags = torch.zeros(count, dtype=torch.int32)
        self._work: dist.Work | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """What all ranks together raised at the last call; starts the exchange of `flags`."""
        self.close()
        known = tuple(bool(flag) for flag in self._flags.tolist())
        self._flags = torch.tensor(flags, dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        return known

    def close(self) -> None:
        """Finish the exchange that is under way, so that the group can be left."""
        if self._work is not None:
            self._work.wait()


@contextmanager
def until_stopped(stopped: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Work that all ranks leave together, without an error, where one was `stopped` in it.

    What is yielded must be called between the steps of the work, equally often on all ranks.
    """
    agreement = Agreement(1)

    def check() -> None:
        if agreement.exchange(stopped())[0]:
            raise StoppedError

    with suppress(StoppedError):
        yield check
    # Another error is this rank's alone: it waits for nobody.
    agreement.close()
