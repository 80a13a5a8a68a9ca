"""A rank that stands still, alive, ends the job and is named with what it was doing."""

import re
import signal
from pathlib import Path

import torch.distributed as dist

from launch.exits import FAILED
from launch.world import join
from tests import ranks
from trainer.group import connected
from trainer.watch import Watch

PATIENCE = 10.0


def stand_still() -> int:
    """Three steps of two ranks, of which rank 1 does not come back from the third."""
    world = join()
    with connected(world, patience=ranks.LIMIT), Watch(world, patience=PATIENCE) as watch:
        for step in range(3):
            watch.mark("waiting for data")
            if step == 2 and world.rank == 1:
                signal.pause()
            watch.mark("computing")
            dist.barrier()
    return 0


def test_a_hung_rank_is_named_by_all(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, stand_still, ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    said = rf"hung: \S+ \(rank 1; waiting for data\): no rank came further for {PATIENCE:g} s"
    assert re.search(said, job.text), job.text
