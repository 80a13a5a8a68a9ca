"""The only module that imports wandb: a second board, if `board.wandb` names a project.

Its own variables apply; with `WANDB_MODE=offline` it needs no network, and `wandb sync` uploads
later what lies in `RUN/wandb/`.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from data import files
from trainer.watch.tensorboard import tag


def check(project: str | None) -> None:
    """Raise ValueError where a project is named and wandb is not installed."""
    if project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"board.wandb = {project!r}: wandb is not installed: pip install wandb, or leave it out"
        )


class WandB:
    """A run of Weights & Biases; each start resumes it.

    The steps of wandb only grow, so the curves are drawn over `images`: what a resumed start does
    again is there twice.

    What it refuses later is logged once, and ends the board, not the run: a start in the night does
    not fail for a server that is down.

    Raises:
        ValueError: wandb refuses to start, and has not shown this run before.
    """

    def __init__(self, run: Path, *, project: str, config: str, log: Callable[[str], None]) -> None:
        import wandb  # no dependency of this project

        file = run / "wandb" / "id"
        if copied := _copied(run):
            log(f"wandb: {run} is a copy of {copied}, and is shown as a run of its own")
        if copied or not file.exists():
            file.parent.mkdir(exist_ok=True)
            files.write(file, secrets.token_hex(4))
        is_known = not copied and _owner(run).exists()
        self._run: Any = None
        self._image, self._log = wandb.Image, log
        try:
            self._run = wandb.init(
                project=project,
                name=_name(run),
                id=file.read_text(),
                resume="allow",
                dir=run,
                config={"toml": config},
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # of many kinds: no login, no network, a wrong project
            said = " ".join(str(error).split())
            if not is_known:
                raise ValueError(f"board.wandb = {project!r}: {said}") from error
            log(f"wandb does not start, and shows nothing of this start: {said}")
            return
        files.write(_owner(run), f"{run.absolute()}")
        self._attempt(lambda: self._run.define_metric("images"))
        self._attempt(lambda: self._run.define_metric("*", step_metric="images"))

    def scalars(self, values: Mapping[str, float], *, images_seen: int) -> None:
        """Add a point to the curve of each value."""
        row = {"images": images_seen, **{tag(k): v for k, v in values.items()}}
        self._attempt(lambda: self._run.log(row))

    def picture(self, name: str, picture: Tensor, *, images_seen: int) -> None:
        """Show uint8 (3, H, W)."""
        pixels = picture.permute(1, 2, 0).numpy()
        self._attempt(lambda: self._run.log({"images": images_seen, name: self._image(pixels)}))

    def close(self) -> None:
        """Upload what is left, and end."""
        self._attempt(lambda: self._run.finish())

    def _attempt(self, act: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # of many kinds: its service was killed, a full disk
            self._run = None
            self._log(
                f"wandb shows nothing any more of this start: {str(error) or type(error).__name__}"
            )


def _name(run: Path) -> str:
    """What a run is called there; those of an ablation are all directories `run`, of a row each."""
    path = run.absolute()
    return f"{path.parent.name}/{path.name}" if path.name == "run" else path.name


def _owner(run: Path) -> Path:
    """The file that names the directory whose id the file beside it is."""
    return run / "wandb" / "of"


def _copied(run: Path) -> str | None:
    """The run directory that this one was copied from, with its id; None where it has its own.

    A directory that is gone was renamed.
    """
    try:
        owner = _owner(run).read_text()
        return None if os.path.samefile(owner, run) else owner
    except OSError:
        return None
