"""A trainer reduced to its data: one rank that serves, records, and saves its position.

From one position to another, every step appends lines `INDEX HASH` to LIFE/served-RANK, then saves
the position in LIFE/position-RANK, as a checkpoint would be saved. With `endless` the last step
waits until the rank is killed.
"""

import hashlib
import os
import time
from pathlib import Path

from data.config import DataConfig
from data.dataset import open_shards
from data.stream import Stream

BATCH = 24


def serve(root: str, life: Path, *, workers: int, images_seen: int, end: int, endless: bool) -> int:
    """Serve this rank's part of the images [images_seen, end)."""
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
        for position in range(images_seen + BATCH, end + 1, BATCH):
            while endless and position == end:
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
