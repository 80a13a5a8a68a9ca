"""What a run shows: `metrics.jsonl`, its timeline, TensorBoard and, if it is wanted, wandb."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data import files
from data.progress import duration, seconds_left
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.run import goodput, history
from trainer.run.directory import Run
from trainer.run.goodput import Goodput
from trainer.run.runstate import RunState
from trainer.run.starts import SPENT
from trainer.watch.mfu import Mfu
from trainer.watch.tensorboard import TensorBoard, is_moved
from trainer.watch.wandb import WandB

# Seconds between two texts of the status.
_TEXT_EVERY = 10.0
# The share of the time that adding up the timeline may take: it grows with every report.
_ACCOUNTING = 0.002


class Board:
    """The records of a run from this start on. Only the main rank has one.

    The run passes over, and tells, what the disk does not let it write.

    Raises:
        OSError: what earlier starts wrote cannot be continued.
    """

    def __init__(self, run: Run, *, config: Config, images_seen: int, mfu: Mfu) -> None:
        self._run, self._path = run, run.path
        self._total = config.training.images
        self._mfu = mfu
        self._began, self._start = time.monotonic(), images_seen
        self._texted = -math.inf
        # What an earlier start wrote beyond the checkpoint that is resumed will be written again.
        earlier = _drop_rows(self._path, after=images_seen)
        text = configs.to_toml(configs.public(config))
        self._tensorboard = TensorBoard(
            self._path / "tensorboard", images_seen=images_seen, config=text, log=run.log
        )
        if self._tensorboard.is_old:
            self._show_again(earlier)
        project = config.board.wandb
        #: Those beside TensorBoard.
        self._others: list[WandB] = []
        if project:
            self._others.append(WandB(self._path, project=project, config=text, log=run.log))
        goodput.append(self._path, goodput.row("training", images=images_seen))
        self._timeline = goodput.read(self._path)
        self._found: Goodput | None = None
        self._accounts_at = -math.inf

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        for board in self._others:
            board.close()

    def report(self, values: Mapping[str, float], *, images_seen: int, slow: str) -> None:
        """Add one row of metrics. `slow` names the slow ranks.

        What is not finite is null in metrics.jsonl.
        """
        values = {**values, **self._mfu.shares(values["images_per_second"])}
        self._append(values, images_seen=images_seen)
        found = self._account(values, images_seen=images_seen)
        hours = self._hours_left(images_seen)
        shares = {f"goodput/{kind}": share for kind, share in found.shares.items()} if found else {}
        shown = {
            **_overview(values, done=images_seen / self._total, hours=hours),
            **values,
            **shares,
        }
        self._scalars(shown, images_seen=images_seen)
        if time.monotonic() > self._texted + _TEXT_EVERY or images_seen >= self._total:
            status = partial(self._show_status, hours=hours, slow=slow, found=found)
            self._show(partial(status, values, images_seen=images_seen))
            self._texted = time.monotonic()

    def values(self, values: Mapping[str, float], *, images_seen: int) -> None:
        """Add the values of a validation or an evaluation, in a row of their own."""
        self._append(values, images_seen=images_seen)
        self._scalars(values, images_seen=images_seen)

    def _scalars(self, values: Mapping[str, float], *, images_seen: int) -> None:
        self._show(partial(self._tensorboard.scalars, values, images_seen=images_seen))
        for board in self._others:
            board.scalars(values, images_seen=images_seen)

    def _show(self, act: Callable[..., None]) -> None:
        """Let TensorBoard show something, as of now, when the disk takes it."""
        self._run.attempt("tensorboard/", partial(act, at=time.time()))

    def _append(self, values: Mapping[str, float], *, images_seen: int) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        row = history.text({"images": images_seen, "time": time.time(), **finite})
        self._run.add_row("metrics.jsonl", row)

    def picture(self, name: str, picture: Tensor, *, images_seen: int) -> None:
        """Show uint8 (3, H, W)."""
        self._show(partial(self._tensorboard.picture, name, picture, images_seen=images_seen))
        for board in self._others:
            board.picture(name, picture, images_seen=images_seen)

    def rest(self, spent: Mapping[str, float], *, images_seen: int) -> None:
        """Add to the timeline what a start has measured since its last report."""
        if spent.keys() - {"saving"}:
            facts = {**spent, "saves": int("saving" in spent), "images": images_seen}
            self._note(facts)

    def closing(self) -> list[str]:
        """The lines that end the log of a start: where the time of the run went."""
        found = goodput.account(self._timeline, now=time.time())
        return [line for line in (f"time: {found}", found.advice()) if line] if found else []

    def _account(self, values: Mapping[str, float], *, images_seen: int) -> Goodput | None:
        """Add a report to the timeline; where the time went, by now or a short time ago."""
        spent = {kind: values[f"{kind}_seconds"] for kind in SPENT if f"{kind}_seconds" in values}
        facts: dict[str, Any] = {
            **spent,
            "waiting": values.get("data_wait_share", 0.0) * values["interval_seconds"],
            "saves": int("saving" in spent),
            "images": images_seen,
            "images_per_second": values["images_per_second"],
        }
        self._note(facts)
        began = time.monotonic()
        if began >= self._accounts_at:
            self._found = goodput.account(self._timeline, now=time.time())
            self._accounts_at = began + (time.monotonic() - began) / _ACCOUNTING
        return self._found

    def _note(self, facts: Mapping[str, Any]) -> None:
        row = goodput.row("report", **facts)
        self._timeline.append(row)
        self._run.attempt("launch/timeline.jsonl", lambda: goodput.append(self._path, row))

    def _hours_left(self, images_seen: int) -> float:
        """At the mean rate since this start began to train, with all that is not training."""
        done, rest = images_seen - self._start, self._total - images_seen
        return seconds_left(time.monotonic() - self._began, done=done, rest=rest) / 3600

    def _show_status(
        self,
        values: Mapping[str, float],
        *,
        images_seen: int,
        hours: float,
        slow: str,
        found: Goodput | None,
        at: float,
    ) -> None:
        """Show the state of the run, as a table in Markdown."""
        state, done = RunState.read(self._path), f"{100 * images_seen / self._total:.1f} %"
        mfu = [f"{100 * values[n]:.1f} % of {w}" for n, w in _MFU if n in values]
        rows = {
            "images": f"{images_seen:,} of {self._total:,} ({done})",
            "time left": duration(3600 * hours),
            "loss": f"{values.get('loss', math.nan):.4f}",
            "rate": f"{values['images_per_second']:.1f} images/s",
            "model FLOPs utilisation": ", ".join(mfu),
            "waiting for data": f"{100 * values.get('data_wait_share', 0.0):.1f} % of the time",
            "skipped steps": f"{values.get('skipped_total', 0.0):.0f} in all",
            "slow ranks": slow or "none",
            "last checkpoint": (state.checkpoint if state else None) or "none yet",
            "starts": str(state.starts) if state else "?",
            "time of the run": str(found or ""),
            "checkpoints": (found.advice() if found else "") or "none was written yet",
            "as of": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)),
        }
        table = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        self._tensorboard.text("0_overview/status", table, images_seen=images_seen, at=at)

    def _show_again(self, earlier: list[history.Row]) -> None:
        """Draw the curves of a run of an earlier release under the tags of this one."""
        for row in earlier:
            known = {k: v for k, v in row.items() if isinstance(v, int | float)}
            images, at = int(known.pop("images")), known.pop("time", None)
            first = _overview(known, done=images / self._total, hours=None)
            moved = {name: v for name, v in known.items() if is_moved(name)}
            self._tensorboard.scalars({**first, **moved}, images_seen=images, at=at)
        self._run.log(
            f"TensorBoard: {len(earlier)} rows of metrics.jsonl are shown under their new tags"
        )


_MFU = (("mfu_measured", "the measured peak"), ("mfu_datasheet", "the datasheet's peak"))
# What is shown first: name there -> metric.
_FIRST = {
    "loss": "loss",
    "images_per_second": "images_per_second",
    "mfu": "mfu_measured",
    "skipped_steps": "skipped_total",
    "data_wait_share": "data_wait_share",
}


def _overview(values: Mapping[str, float], *, done: float, hours: float | None) -> dict[str, float]:
    """What answers "is it healthy, and how long still", in a group that is shown first."""
    first = {name: values[metric] for name, metric in _FIRST.items() if metric in values}
    left = {} if hours is None else {"hours_left": hours}
    shown = {**first, "share_done": done, **left}
    return {f"0_overview/{name}": value for name, value in shown.items()}


def _drop_rows(run: Path, *, after: int) -> list[history.Row]:
    """Remove the rows of later clocks, and a last row that was torn; returns the others."""
    kept = [row for row in history.read(run) if row["images"] <= after]
    file, text = history.file(run), "".join(map(history.text, kept))
    if file.exists() and file.read_text(errors="replace") != text:
        files.write(file, text)
    return kept
