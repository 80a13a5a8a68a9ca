"""The run directory: a run is a directory, and the same command on it resumes.

`RUN/`: `config.toml` and `ds_config.json` as resolved, `log.txt`, `metrics.jsonl`, `tensorboard/`,
`samples/`, `checkpoints/`, `launch/`.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from launch.writer import Writer, claim
from trainer import config as configs
from trainer.config import Config


@dataclass(frozen=True)
class Run:
    """The paths of a run, and its log. Only the main rank writes, once it has claimed the run."""

    path: Path
    writer: Writer | None = None

    @contextmanager
    def claimed(self) -> Iterator["Run"]:
        """This run, with the right to write it.

        Raises:
            ValueError: another job writes it.
        """
        writer = claim(self.path)
        yield replace(self, writer=writer)
        writer.release()

    def check_writer(self) -> None:
        """Return if this process may still write. Called ahead of every append and commit.

        Raises:
            ValueError: another start has taken the run over.
        """
        assert self.writer is not None, "claim the run before writing it"
        self.writer.check()

    @property
    def is_asked_to_stop(self) -> bool:
        return self.writer is not None and self.writer.asked_to_stop

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def check(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """What `config` changes of the run that is here; touches nothing.

        Raises:
            ValueError: the directory holds something else, or a run that `config` cannot continue.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self._contents())):
            return {}
        if not self.config_file.is_file():
            raise ValueError(
                f"{self.path} exists and is no run directory (it has no config.toml): "
                "name a new directory with --run"
            )
        return configs.changes_between(configs.load(self.config_file), config)

    def _contents(self) -> list[Path]:
        """What is there besides the launcher's, and the log of starts that left before a step."""
        return [p for p in self.path.iterdir() if p.name not in ("launch", "code", "log.txt")]

    def open(self, config: Config, *, mechanics: dict[str, Any]) -> None:
        """Create the directory, or update its record of the config."""
        self.check_writer()
        self.path.mkdir(parents=True, exist_ok=True)
        _replace(self.config_file, configs.to_toml(config))
        _replace(self.path / "ds_config.json", json.dumps(mechanics, indent=2) + "\n")

    def picture(self, name: str, grid: NDArray[np.uint8]) -> None:
        """Keep uint8 (3, H, W) as `samples/NAME.png`."""
        self.check_writer()
        self.samples.mkdir(exist_ok=True)
        Image.fromarray(grid.transpose(1, 2, 0)).save(self.samples / f"{name}.png")

    def log(self, text: str) -> None:
        """A dated line to the terminal and to log.txt."""
        self.check_writer()
        line = self._append(text)
        if sys.stdout.isatty():
            line = line.ljust(79)  # covers what the progress line left
        print(line, flush=True)

    def log_loss(self, text: str) -> None:
        """A dated line to log.txt about a lost rank: any rank's, since the main one may be lost."""
        self._append(text)

    def _append(self, text: str) -> str:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
        with (self.path / "log.txt").open("a") as log:
            log.write(line + "\n")
        return line


def _replace(file: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)
