"""What a run shows: `metrics.jsonl`, and `tensorboard/`, which this module alone writes."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data import files


class Board:
    """`metrics.jsonl` and `tensorboard/` of a run. Only the main rank has one."""

    def __init__(self, run: Path, *, images_seen: int, config: str) -> None:
        # What an earlier start wrote beyond the checkpoint that is resumed will be written again.
        _drop_rows(run / "metrics.jsonl", after=images_seen)
        self._jsonl = (run / "metrics.jsonl").open("a")
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=images_seen + 1)
        self._writer.add_text("config", f"```toml\n{config}\n```", global_step=images_seen)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jsonl.close()
        self._writer.close()

    def scalars(self, values: Mapping[str, float], *, images_seen: int) -> None:
        """Write one row of metrics; what is not finite is null in metrics.jsonl."""
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._jsonl.write(json.dumps({"images": images_seen, "time": time.time(), **finite}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, images_seen)
        self._writer.flush()

    def grid(self, name: str, picture: Tensor, *, images_seen: int) -> None:
        """Show uint8 (3, H, W)."""
        self._writer.add_image(name, picture, images_seen)
        self._writer.flush()


def _drop_rows(file: Path, *, after: int) -> None:
    """Remove the rows of later clocks, and a last row that was torn."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if _clock(line) <= after]
    if kept != lines:
        files.write(file, "".join(f"{line}\n" for line in kept))


def _clock(row: str) -> float:
    """The clock of a row; infinity where it cannot be read."""
    try:
        return float(json.loads(row)["images"])
    except (ValueError, KeyError, TypeError):
        return math.inf
