"""What the ranks do together: connect, agree before they act, exchange Python objects, end.

No rank decides alone on a signal, a checkpoint or an error. A rank that fails exits soon, so that
the launcher ends the others and its message is the first.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from data import descriptors
from data.exits import is_ours
from trainer.ranks.connections import kept_alive
from trainer.ranks.device import check_interfaces, device_of
from trainer.ranks.ending import is_held_up
from trainer.ranks.faults import Broken, Fault, Refused, StoppedError
from trainer.ranks.meeting import exchange, meeting_store
from trainer.ranks.signals import ended_by_ctrl_c
from trainer.ranks.world import World, host_name

T = TypeVar("T")

# Collectives that torch's flight recorder remembers, for what is written when a rank hangs.
_REMEMBERED = 2000
# Bytes that no network carries in one packet.
_LARGE = 2**14
# Longer than any job is suspended; in milliseconds it has less than 32 bits.
_WATCHED = timedelta(days=14)


@contextmanager
def connected(world: World, *, patience: float, gpus: int | None = None) -> Iterator[torch.device]:
    """The process group of all ranks while entered: gloo for CPU tensors, NCCL for the GPU's.

    The ranks must meet within `patience` seconds and a minute. From then on a `Watchdog` ends what
    hangs: torch's timers would also count the hours of a job that was suspended. `gpus` is as for
    `device_of`.

    Raises:
        ValueError: too few files may be open here.
        Refused, Broken: on every rank, if one has no device, or is not the rank that it says.
        ConnectionError: this rank does not reach another, or is not reached.
    """
    descriptors.raise_limit()
    # The main rank holds a connection or two of every other; the rest are files and libraries.
    descriptors.require(4 * world.size + 600, why=f"{world.size} ranks")
    os.environ.update(world.environment())
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_REMEMBERED))
    with kept_alive():
        device = _meet(world, timeout=timedelta(seconds=patience + 60), gpus=gpus)
        try:
            yield device
        except (Refused, Broken):
            # All ranks are here alike. Where a peer is gone, leaving the group may wait for it.
            if not is_held_up():
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@ended_by_ctrl_c()
def _meet(world: World, *, timeout: timedelta, gpus: int | None) -> torch.device:
    """Make the process group; returns the device."""
    store = meeting_store(world, timeout=timeout)
    device = _agreed_device(world, store=store, gpus=gpus)
    # What wraps it for TORCH_DISTRIBUTED_DEBUG=DETAIL keeps the timeout that it is made with.
    is_kept = dist.get_debug_level() == dist.DebugLevel.DETAIL
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            # Gloo waits five times as long for a connection that another rank opens.
            timeout=_WATCHED if is_kept else timeout / 5,
            device_id=device if device.type == "cuda" else None,
        )
        if not is_kept:  # nothing would end it there
            check_packets()
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or not is_of_a_collective(error):
            raise
        raise ConnectionError(
            f"the ranks do not reach each other: {error}: set GLOO_SOCKET_IFNAME to a network "
            "interface that connects their nodes (`ip addr` lists them)"
        ) from None
    if not is_kept:
        # Torch 2.15 has a public name for it, and warns of the other.
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(_WATCHED)
    # DeepSpeed makes groups of its own, and would leave them torch's half an hour.
    distributed_c10d.default_pg_timeout = _WATCHED
    return device


def check_packets() -> None:
    """Raise ConnectionError where large packets are dropped, as by a switch with a smaller MTU.

    The first gradients would hang, after all small messages. All ranks must call it.
    """
    mine = torch.zeros(_LARGE, dtype=torch.uint8)
    try:
        dist.all_gather([torch.empty_like(mine) for _ in range(dist.get_world_size())], mine)
    except RuntimeError as error:
        raise ConnectionError(
            f"the ranks reach each other, but {_LARGE >> 10} KiB do not arrive: {error}: large "
            "packets may be dropped between their nodes: lower the MTU of their interfaces to what "
            "`ping -M do -s BYTES HOST` passes, or set sysctl net.ipv4.tcp_mtu_probing=1 on all"
        ) from None


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


def _agreed_device(world: World, *, store: dist.Store, gpus: int | None) -> torch.device:
    """This rank's device, once every rank has one. There is no process group yet."""
    device, fault = torch.device("cpu"), None
    try:
        device = device_of(world, gpus=gpus)
        check_interfaces()
    except ValueError as error:
        fault = Fault(str(error), True)
    except RuntimeError as error:
        fault = Fault.of_gpu(error, host=host_name())
    faults = exchange(store, world, fault and astuple(fault))
    _raise([said and Fault(*said) for said in faults])
    return device


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
    _raise(gather(mine))
    return results[0]


def _raise(faults: Sequence[Fault | None]) -> None:
    if fault := Fault.of_all(faults):
        raise fault.alike()


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


def is_of_a_collective(error: Exception) -> bool:
    """Whether NCCL, gloo or the store raised it; gloo's are of no type of their own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
