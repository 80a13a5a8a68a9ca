"""The only module that imports TensorBoard: the curves, texts and pictures of a run."""

import io
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams import summary_v2 as hparams_api  # `api` needs TensorFlow
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from data import files
from data.progress import duration
from trainer.run.starts import SPENT
from trainer.watch.metrics import BY_QUARTER

# Where a metric without a group of its own is shown; all others are under "train".
_GROUPS = {
    "optimizer": ("lr", "grad_norm", "param_norm", "loss_scale", "skipped", "skipped_total"),
    "speed": (
        *("images_per_second", "mfu_measured", "mfu_datasheet", "interval_seconds"),
        *("data_wait_seconds", "data_wait_share", "forward_seconds", "slowest_rank"),
        *(f"{kind}_seconds" for kind in SPENT),
    ),
    "memory": ("memory_gib", "host_memory_gib", "host_memory_growth_gib"),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
# Beside the event files; without it, they were written by a release with other tags.
_LAYOUT_FILE, _LAYOUT = "layout", "2"
# How the names of event files begin; a number follows.
_NAME = "events.out.tfevents."
# The most bytes of events that wait for room on a full disk.
_UNWRITTEN = 2**28


def tag(name: str) -> str:
    """The tag of a metric: "GROUP/NAME"."""
    return name if "/" in name else _TAGS.get(name, f"train/{name}")


def is_moved(name: str) -> bool:
    """Whether a metric had another tag in the last release."""
    return name in _TAGS


def hparams(
    directory: Path, rows: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]]
) -> None:
    """Show rows in the tab HParams, each by its settings and its figures, in place of the last.

    All rows have the same settings: TensorBoard takes the columns from one summary for all.
    """
    shutil.rmtree(directory, ignore_errors=True)
    names = next(iter(rows.values()))[0]
    figures = {name: None for _, each in rows.values() for name in each}
    config = hparams_api.hparams_config_pb(
        hparams=[hparams_api.HParam(name) for name in names],
        metrics=[hparams_api.Metric(name) for name in figures],
    )
    with SummaryWriter(str(directory)) as writer:
        writer._get_file_writer().add_summary(config)
    for row, (settings, values) in rows.items():
        shown = {name: _shown(value) for name, value in settings.items()}
        with SummaryWriter(str(directory / row)) as writer:
            writer._get_file_writer().add_summary(hparams_api.hparams_pb(shown, trial_id=row))
            for name, value in values.items():
                writer.add_scalar(name, value, 0)


def _shown(value: object) -> bool | int | float | str:
    """A setting as the tab HParams can show it."""
    if isinstance(value, bool | int | float | str):
        return value
    return "absent" if value is None else str(value)


class TensorBoard:
    """The event file of a start of a run; each start adds one.

    What the disk does not take waits for the next call. (TensorBoard's own writer is a thread: it
    would end with a traceback and lose that.)

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(
        self, directory: Path, *, images_seen: int, config: str, log: Callable[[str], None]
    ) -> None:
        #: Whether the curves of earlier starts have other tags.
        self.is_old = directory.exists() and not (directory / _LAYOUT_FILE).exists()
        self._file = directory / f"{_NAME}{_number(directory, log=log)}.{socket.gethostname()}"
        self._unwritten: deque[bytes] = deque()
        self._make_directory()
        # What an earlier start wrote beyond the checkpoint that is resumed will be written again.
        begun = SessionLog(status=SessionLog.START)
        first = Event(file_version="brain.Event:2"), Event(session_log=begun, step=images_seen + 1)
        quarters = {
            f"{name} by quarter of t (q0: least noise)": ["Multiline", [rf"^{name}/q\d$"]]
            for name in BY_QUARTER
        }
        layout = Event(summary=summary.custom_scalars({"loss by timestep": quarters}))
        self._write(*first, layout)
        self.text("config", f"```toml\n{config}\n```", images_seen=images_seen)

    def scalars(
        self, values: Mapping[str, float], *, images_seen: int, at: float | None = None
    ) -> None:
        """Add a point to the curve of each value, of the time `at` (since 1970) if not of now.

        Raises:
            OSError: the disk is full, or fails; so for the other methods.
        """
        each = (summary.scalar(tag(name), value) for name, value in values.items())
        self._write(*(Event(summary=s, step=images_seen) for s in each), at=at)

    def text(self, name: str, markdown: str, *, images_seen: int, at: float | None = None) -> None:
        """Show a text in place of the last of that name."""
        self._write(Event(summary=summary.text(name, markdown), step=images_seen), at=at)

    def picture(
        self, name: str, picture: Tensor, *, images_seen: int, at: float | None = None
    ) -> None:
        """Show uint8 (3, H, W)."""
        shown = summary.image(name, picture, dataformats="CHW")
        self._write(Event(summary=shown, step=images_seen), at=at)

    def _write(self, *events: Event, at: float | None = None) -> None:
        """Write events, those too that had no room before."""
        for event in events:
            event.wall_time = time.time() if at is None else at
            record = io.BytesIO()
            RecordWriter(record).write(event.SerializeToString())
            self._unwritten.append(record.getvalue())
        while sum(map(len, self._unwritten)) > _UNWRITTEN:
            self._unwritten.popleft()
        if not self._file.parent.exists():  # it may have been removed meanwhile
            self._make_directory()
        files.append(self._file, b"".join(self._unwritten))
        self._unwritten.clear()

    def _make_directory(self) -> None:
        directory = self._file.parent
        directory.mkdir(exist_ok=True)
        (directory / _LAYOUT_FILE).write_text(_LAYOUT + "\n")


def _number(directory: Path, *, log: Callable[[str], None]) -> str:
    """The number of a new event file: the time, or more, since they are read in this order."""
    now = int(time.time())
    names = (
        path.name.removeprefix(_NAME).partition(".")[0] for path in directory.glob(f"{_NAME}*")
    )
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    if newest > now:
        log(
            f"TensorBoard: the clock is {duration(newest - now)} behind the last start's; the new "
            "curves are put after its own"
        )
    return f"{max(now, newest + 1):010d}"
