"""A trainer reduced to its data: one rank that serves, records, and saves its position.

    python -m tests.support.data_trainer SHARDS LIFE RANK RANKS WORKERS IMAGES END ENDLESS

From position IMAGES to END, every step appends lines `INDEX HASH` to LIFE/served-RANK, then saves
the position in LIFE/position-RANK, as a checkpoint would be saved. With ENDLESS = 1 the last step
waits until the rank is killed.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from data.config import DataConfig
from data.dataset import open_shards
from data.stream import Stream

BATCH = 24


def main(
    root: str,
    life: Path,
    rank: int,
    ranks: int,
    workers: int,
    images_seen: int,
    end: int,
    endless: int,
) -> None:
    """Serve one rank's part of the images [images_seen, end)."""
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
