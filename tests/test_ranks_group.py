"""How the ranks leave together."""

import subprocess
import sys
from pathlib import Path

from data.exits import REFUSED
from tests.support import ranks


def test_a_user_error_ends_every_rank_with_its_status(
    tmp_path: Path, weights: dict[str, list[str]]
) -> None:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    ask = ["trainer.sample", *weights["unet"], "--classes", "99", "--out", str(tmp_path / "a.npz")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *ask],
            cwd=ranks.ROOT,
            env={**ranks.environment(), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=ranks.LIMIT)[1] for process in processes]
    # With the group left open, the threads of torch aborted most processes here.
    assert [process.returncode for process in processes] == [REFUSED] * 2, said
    assert said[0] == "error: --classes: 99 is not among the classes 0 to 9\n"
