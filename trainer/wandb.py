"""The only module that imports wandb: a second board, if `board.wandb` names a project.

Its own variables apply; with `WANDB_MODE=offline` it needs no network, and `wandb sync` uploads
later what lies in `RUN/wandb/`.
"""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from data import files
from trainer.tensorboard import tag


def check(project: str | None) -> None:
    """Return if no project is named, or wandb is installed.

    Raises:
        ValueError: it is not.
    """
    if project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"board.wandb = {project!r}: wandb is not installed: pip install wandb, or leave it out"
        )


class WandB:
    """A run of Weights & Biases; each start resumes it.

    The steps of wandb only grow, so the curves are drawn over `images`: what a resumed start does
    again is there twice.

    Raises:
        ValueError: wandb refuses to start.
    """

    def __init__(self, run: Path, *, project: str, config: str) -> None:
        import wandb  # no dependency of this project

        file = run / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            files.write(file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=run.name,
                id=file.read_text(),
                resume="allow",
                dir=run,
                config={"toml": config},
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # of many kinds: no login, no network, a wrong project
            said = " ".join(str(error).split())
            raise ValueError(f"board.wandb = {project!r}: {said}") from error
        self._image = wandb.Image
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def scalars(self, values: Mapping[str, float], *, images_seen: int) -> None:
        """Add a point to the curve of each value."""
        self._run.log({"images": images_seen, **{tag(k): v for k, v in values.items()}})

    def picture(self, name: str, picture: Tensor, *, images_seen: int) -> None:
        """Show uint8 (3, H, W)."""
        shown = self._image(picture.permute(1, 2, 0).numpy())
        self._run.log({"images": images_seen, name: shown})

    def close(self) -> None:
        """Upload what is left, and end."""
        self._run.finish()
