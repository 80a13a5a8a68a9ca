"""The process group of all ranks: made, checked and left.

The ranks meet in a store (`meeting`); only then each says which device it has, if any.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from data import descriptors
from trainer.ranks.connections import kept_alive
from trainer.ranks.device import check_interfaces, device_of
from trainer.ranks.ending import is_held_up
from trainer.ranks.faults import Broken, Fault, Refused, is_of_a_collective, raise_any
from trainer.ranks.meeting import exchange, meeting_store
from trainer.ranks.signals import ended_by_ctrl_c
from trainer.ranks.world import World, host_name

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
    raise_any([said and Fault(*said) for said in faults])
    return device
