"""The only module that imports TensorBoard: the curves, texts and pictures of a run."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2 as hparams_api  # `api` needs TensorFlow
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

# Where a metric without a group of its own is shown; all others are under "train".
_GROUPS = {
    "optimizer": ("lr", "grad_norm", "param_norm", "loss_scale", "skipped", "skipped_total"),
    "speed": (
        *("images_per_second", "mfu_measured", "mfu_datasheet", "interval_seconds"),
        *("data_wait_seconds", "data_wait_share", "forward_seconds", "slowest_rank"),
        *("saving_seconds", "averaging_seconds", "drawing_seconds", "validating_seconds"),
        *("evaluating_seconds", "auditing_seconds", "suspended_seconds", "compiling_seconds"),
    ),
    "memory": ("memory_gib", "host_memory_gib", "host_memory_growth_gib"),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
# Beside the event files; without it, they were written by a release with other tags.
_LAYOUT_FILE, _LAYOUT = "layout", "2"
# Bytes that must be free: on a full disk a thread of TensorBoard's ends with a traceback.
_ROOM = 2**22


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
    """The event files of a run. Each start adds one.

    Raises:
        OSError: they cannot be written.
    """

    def __init__(self, directory: Path, *, images_seen: int, config: str) -> None:
        #: Whether the curves of earlier starts have other tags.
        self.is_old = directory.exists() and not (directory / _LAYOUT_FILE).exists()
        # What an earlier start wrote beyond the checkpoint that is resumed will be written again.
        writer = SummaryWriter(str(directory), purge_step=images_seen + 1)
        self._directory = directory
        self._writer: SummaryWriter | None = writer
        (directory / _LAYOUT_FILE).write_text(_LAYOUT + "\n")
        writer.add_text("config", f"```toml\n{config}\n```", global_step=images_seen)
        quarters = {
            f"{name} by quarter of t (q0: least noise)": ["Multiline", [rf"^{name}/q\d$"]]
            for name in ("loss", "mse", "vb")
        }
        writer.add_custom_scalars({"loss by timestep": quarters})

    def scalars(
        self, values: Mapping[str, float], *, images_seen: int, time: float | None = None
    ) -> None:
        """Add a point to the curve of each value, of `time` (seconds since 1970) if not of now."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(tag(name), value, images_seen, walltime=time)

        self._write(add)

    def text(self, name: str, markdown: str, *, images_seen: int) -> None:
        """Show a text in place of the last of that name."""
        self._write(lambda writer: writer.add_text(name, markdown, images_seen))

    def picture(self, name: str, picture: Tensor, *, images_seen: int) -> None:
        """Show uint8 (3, H, W)."""
        self._write(lambda writer: writer.add_image(name, picture, images_seen))

    def close(self) -> None:
        """Write all to disk, and end."""
        if self._writer is not None:
            with suppress(OSError):  # all that was added is on disk
                self._writer.close()

    def _write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Add to the events, and write them to disk.

        Raises:
            OSError: the disk is full. The next call tries again, with a new file.
        """
        if shutil.disk_usage(self._directory).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
        writer, self._writer = self._writer or SummaryWriter(str(self._directory)), None
        add(writer)
        writer.flush()
        self._writer = writer
