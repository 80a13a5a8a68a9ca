"""What a run shows: rows of metrics, each clock once, whatever an earlier start left."""

import json
from pathlib import Path

from trainer.tensorboard import Board


def test_rows_beyond_the_checkpoint_and_a_torn_row_are_not_kept(tmp_path: Path) -> None:
    with Board(tmp_path, images_seen=0, config="") as board:
        for images_seen in (64, 128, 192):
            board.scalars({"loss": 1.0}, images_seen=images_seen)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 256, "lo')  # killed here, and resumed at 128
    with Board(tmp_path, images_seen=128, config="") as board:
        board.scalars({"loss": 2.0}, images_seen=192)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["images"], row["loss"]) for row in rows] == [(64, 1.0), (128, 1.0), (192, 2.0)]
