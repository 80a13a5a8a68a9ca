"""Where the ranks meet: the store that their process group, and all that they exchange, begin from.

torchrun's own store outlives the ranks: those that it starts again (`--max-restarts`) find in it
what the ones before have left, such as addresses at which nobody answers any more, and torchrun's
count of restarts may differ from node to node. So every start uses a part of its own.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.ranks.faults import Broken, Refused
from trainer.ranks.world import World, host_name

# Seconds between two looks at the store.
_LOOK = 0.05
# Seconds between two lines about ranks that have not come, and how many such a line names.
_TELL, _NAMED = 30.0, 8
# Nodes of torchrun that stay keep the store of before, where one that joins opens another.
_ELASTIC = (
    "did not come in time: where nodes of torchrun come and go, start it on each with "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
)


def meeting_store(world: World, *, timeout: timedelta) -> dist.Store:
    """The store on the main rank's host, or torchrun's, as if it were empty. All ranks call it.

    Raises:
        Broken: its port is taken, or a rank of torchrun did not come.
        TimeoutError: a rank did not come, or cannot reach the store.
    """
    try:
        with _missing_named(world):
            meet = dist.rendezvous("env://", world.rank, world.size, timeout=timeout)
            store: dist.Store = next(iter(meet))[0]
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise TimeoutError(_not_met(world, error)) from None
        raise Broken(
            f"port {world.port} of {host_name()} is in use, perhaps by another run: set "
            "MASTER_PORT, or the launcher's option, as in `deepspeed --master_port 29511 ...`"
        ) from None
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store.set(f"here {world.rank}", "")
        return store
    end = time.monotonic() + timeout.total_seconds()
    name = _answer_all(store, world, end=end) if world.is_main else _ask(store, world, end=end)
    return dist.PrefixStore(name, store)


@contextmanager
def _missing_named(world: World) -> Iterator[None]:
    """While entered, the main rank says each half minute which ranks have not come yet.

    They may have ended before: neither srun nor ssh ends the others for that. Every other node says
    that it cannot resolve the main rank's, or that nothing answers there: torch tries for twice its
    timeout, and says it in C++.
    """
    met = threading.Event()
    if world.local_rank == 0:
        threading.Thread(target=_name_missing, args=(world, met), daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _name_missing(world: World, met: threading.Event) -> None:
    while not met.wait(_TELL):
        try:
            found = socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM)
        except OSError as error:
            me, where, why = host_name(), world.address, error.strerror
            print(
                f"{me} cannot resolve {where} (MASTER_ADDR), where the ranks meet: {why}",
                flush=True,
            )
            continue
        if not world.is_main:
            _name_unreached(world, found)
            continue
        with suppress(dist.DistError):
            # The main rank's own waits for all.
            store = dist.TCPStore(world.address, world.port, wait_for_workers=False)
            missing = [rank for rank in range(1, world.size) if not store.check([f"here {rank}"])]
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            ranks = f"{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:_NAMED]))}{more}"
            if missing:
                where = f"{world.address}:{world.port}"
                print(f"waiting at {where} for rank{ranks} of {world.size}", flush=True)


def _name_unreached(world: World, found: Sequence[tuple[Any, ...]]) -> None:
    """Name the addresses of the main rank's where nothing answers: torch waits minutes for each."""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(_TELL)
                probe.connect(address)
        except OSError as error:
            me, where, why = host_name(), f"{world.address}:{world.port}", error.strerror or error
            which = f", address {address[0]}" if len(found) > 1 else ""
            print(
                f"{me} waits for rank 0: nothing answers at {where}{which} (MASTER_ADDR, "
                f"MASTER_PORT): {why}",
                flush=True,
            )


def _not_met(world: World, error: dist.DistError) -> str:
    why = str(error).partition("\n")[0]  # torch may add a stack trace
    return (
        f"the ranks did not meet at {world.address}:{world.port}: {why} See that all "
        f"{world.size} are started, each with its own RANK, and that their nodes reach this "
        "address (MASTER_ADDR, MASTER_PORT)"
    )


def exchange(store: dist.Store, world: World, mine: Any) -> list[Any]:
    """What every rank has, plain JSON, in the order of the ranks. All ranks must call it, once.

    Raises:
        Refused: on every rank, unless the processes that came are the ranks that they should be.
        TimeoutError: another rank did not come.
    """
    try:
        found = _exchanged(store, world, mine)
    except dist.DistError as error:
        raise TimeoutError(_not_met(world, error)) from None
    _check(found, size=len(found))
    return [said for *_, said in sorted(found, key=lambda each: each[0])]


def _exchanged(store: dist.Store, world: World, mine: Any) -> list[Any]:
    """Rank, number of ranks, host and what it has, of each process that came."""
    if world.is_main:
        store.set("size", str(world.size))
    size = int(store.get("size"))
    # Two may have one RANK, or one RANK be too high: what each leaves is under a number of its own.
    number = store.add("came", 1)
    store.set(f"came {number}", json.dumps([world.rank, world.size, host_name(), mine]))
    everyone = range(1, size + 1)
    found = [json.loads(said) for said in store.multi_get([f"came {n}" for n in everyone])]
    store.set(f"heard {number}", "")
    if world.is_main:  # the store may end with this process
        store.wait([f"heard {n}" for n in everyone])
    return found


def _check(found: Sequence[Sequence[Any]], *, size: int) -> None:
    """Raise Refused unless these are the ranks of `size`, each once."""
    ranks = [rank for rank, *_ in found]
    odd = sorted(
        f"rank {rank} of {of} on {host}"
        for rank, of, host, _ in found
        if of != size or rank >= size or ranks.count(rank) > 1
    )
    if odd:
        raise Refused(
            f"the ranks of a job of {size} came up as {', '.join(odd)}: start each process with "
            f"its own RANK, from 0 to {size - 1}, and all with WORLD_SIZE={size}"
        )


def _answer_all(store: dist.Store, world: World, *, end: float) -> str:
    """Tell every other rank the name of this start's part, until all have heard it.

    Each asks with a word of its own. An answer to the word of a process that has ended does no
    harm: nobody waits for it.
    """
    name = secrets.token_hex(8)
    missing = set(range(1, world.size))
    while missing:
        for rank in sorted(missing):
            if _read(store, f"heard {rank}") == name:
                missing.remove(rank)
            elif (word := _read(store, f"word {rank}")) is not None:
                store.set(f"answer {rank}", f"{word} {name}")
        if missing and time.monotonic() > end:
            raise Broken(f"ranks {', '.join(map(str, sorted(missing)))} {_ELASTIC}")
        time.sleep(_LOOK if missing else 0)
    return name


def _ask(store: dist.Store, world: World, *, end: float) -> str:
    """The name of this start's part, from the main rank."""
    word = secrets.token_hex(8)
    store.set(f"word {world.rank}", word)
    while True:
        asked, _, name = (_read(store, f"answer {world.rank}") or "").partition(" ")
        if asked == word:
            store.set(f"heard {world.rank}", name)
            return name
        if time.monotonic() > end:
            raise Broken(f"the main rank {_ELASTIC}")
        time.sleep(_LOOK)


def _read(store: dist.Store, key: str) -> str | None:
    """What is there under a key; to get what is not would wait for it."""
    return store.get(key).decode() if store.check([key]) else None
