"""A hung rank ends the job and is named with what it was doing; a refused run leaves no thread."""

import pickle
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.exits import FAILED
from tests.support import ranks
from trainer import forensics
from trainer.ranks.group import Refused, connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join

PATIENCE = 10.0


def stand_still(directory: Path) -> int:
    """Three steps of two ranks, of which rank 1 does not come back from the third."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watchdog(world, patience=PATIENCE) as watchdog:
        watchdog.dump = partial(forensics.dump, directory, rank=world.rank)
        for step in range(3):
            watchdog.mark("waiting for data")
            if step == 2 and world.rank == 1:
                signal.pause()
            watchdog.mark("computing")
            dist.barrier()
    return 0


def test_a_hung_rank_is_named_by_all(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(stand_still, tmp_path), ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    said = rf"hung: \S+ \(rank 1; waiting for data\): no rank made progress for {PATIENCE:g} s"
    assert re.search(said, job.text), job.text
    # Where each of them stood, and that rank 1 has not come to the last barrier.
    assert "in stand_still" in (tmp_path / "stacks_rank_1").read_text()
    assert "in barrier" in (tmp_path / "stacks_rank_0").read_text()
    traces = [(tmp_path / f"fr_trace_rank_{rank}").read_bytes() for rank in (0, 1)]
    barriers = [
        sum(entry["profiling_name"] == "gloo:barrier" for entry in pickle.loads(trace)["entries"])
        for trace in traces
    ]
    assert barriers[0] == barriers[1] + 1


class SlowStore:
    """A store that answers after a second, as on a busy machine."""

    def __init__(self, store: dist.TCPStore) -> None:
        self.set = store.set
        self._store = store

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(1.0)
        return self._store.multi_get(keys)


def refuse() -> int:
    """A run that is refused while the watchdog's thread waits for the store."""
    world, before = join(), threading.enumerate()
    with connected(world, patience=ranks.LIMIT):
        try:
            with Watchdog(world, patience=PATIENCE) as watchdog:
                watchdog._store = SlowStore(watchdog._store)
                time.sleep(1.5)
                raise Refused("no shards")
        except Refused:
            return len(set(threading.enumerate()) - set(before))


def test_no_thread_is_in_the_store_when_a_refused_run_exits(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, refuse, ranks=1)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0], job.text
