"""Killed at random moments, restarted on other ranks: the sequence is the uninterrupted one.

A rank here is a trainer reduced to its data: it serves, records, and saves its position.
"""

import hashlib
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest

from data.config import DataConfig
from data.dataset import Shards, open_shards
from data.stream import Stream
from tests.support.data_fixtures import pack_folder
from tests.support.ranks import LIMIT, fork

BATCH = 24
END = 120 * BATCH


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return pack_folder(tmp_path_factory.mktemp("kill"), images=100)


def serve(root: str, life: Path, *, workers: int, images_seen: int, endless: bool) -> int:
    """Serve this rank's part of the images [images_seen, END).

    Every step appends lines `INDEX HASH` to LIFE/served-RANK, then saves the position in
    LIFE/position-RANK, as a checkpoint would be saved. With `endless` the last step waits until the
    rank is killed.
    """
    rank, ranks = (int(os.environ.get(*each)) for each in (("RANK", "0"), ("WORLD_SIZE", "1")))
    config = DataConfig(shards=root, image_size=16, streams=8, block=7, workers=workers)
    served = (life / f"served-{rank}").open("w")
    with Stream(open_shards(root), config=config, seed=9) as stream:
        batches = stream.batches(
            images_seen=images_seen,
            batch_size=BATCH,
            micro_batch_size=BATCH // ranks,
            rank=rank,
            ranks=ranks,
        )
        for position in range(images_seen + BATCH, END + 1, BATCH):
            while endless and position == END:
                time.sleep(1)
            batch = next(batches)
            for image, index in zip(batch.images, batch.indices, strict=True):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                served.write(f"{int(index)} {digest}\n")
            served.flush()
            (life / f"aside-{rank}").write_text(str(position))
            os.replace(life / f"aside-{rank}", life / f"position-{rank}")
            time.sleep(0.005)  # stands for the step
    return 0


def live(
    shards: Shards, life: Path, *, images_seen: int, ranks: int, workers: int, kill: float | None
) -> int:
    """Run all ranks from a position on; kill them some time into it. The position they saved."""
    life.mkdir(parents=True)
    for rank in range(ranks):
        (life / f"position-{rank}").write_text(str(images_seen))
    where = {"images_seen": images_seen, "endless": kill is not None}
    job = fork(life, partial(serve, shards.root, life, workers=workers, **where), ranks=ranks)
    if kill is None:
        job.wait()
        assert [process.exitcode for process in job.ranks] == [0] * ranks, job.text
    else:
        wait_until_all_are_past(life, images_seen)
        time.sleep(kill)
        job.kill()
    return min(int(file.read_text()) for file in life.glob("position-*"))


def wait_until_all_are_past(life: Path, images_seen: int) -> None:
    deadline = time.monotonic() + LIMIT
    while min(int(file.read_text()) for file in life.glob("position-*")) <= images_seen:
        assert time.monotonic() < deadline, "no rank has come further"
        time.sleep(0.01)


def read(life: Path) -> dict[int, str]:
    served: dict[int, str] = {}
    for file in life.glob("served-*"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a killed rank may leave half a line
                number, digest = line.split()
                assert int(number) not in served
                served[int(number)] = digest
    return served


def test_killed_and_restarted_equals_uninterrupted(shards: Shards, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    serve(shards.root, tmp_path / "whole", workers=0, images_seen=0, endless=False)
    wanted = read(tmp_path / "whole")
    assert sorted(wanted) == list(range(END))

    draw, got, images_seen = random.Random(), {}, 0
    for number, ranks in enumerate((2, 3, 1)):
        life = tmp_path / f"life-{number}"
        kill = None if number == 2 else draw.uniform(0, 0.2)
        reached = live(
            shards, life, images_seen=images_seen, ranks=ranks, workers=2 - number, kill=kill
        )
        assert images_seen < reached and (reached == END) == (number == 2)
        served = read(life)
        got |= {image: served[image] for image in range(images_seen, reached)}
        # Some ranks had gone on beyond the saved position; that, too, was the same sequence.
        assert all(wanted[image] == digest for image, digest in served.items())
        images_seen = reached
    assert got == wanted
