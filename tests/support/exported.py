"""A network of features for the tests, as `--network` takes it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.evaluate import main


class Convolutions(nn.Module):
    """A fixed random network: its features tell digits, noise and blur apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)

    def forward(self, images: Tensor) -> Tensor:
        # The program that is exported says of this tensor that it is on the CPU.
        x = images.float() / torch.full((1,), 127.5) - 1
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)


def save(path: Path) -> Path:
    """Write it for images of 8 x 8."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("images", min=1, max=4096)}}
    program = torch.export.export(Convolutions(), (images,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return path


def refused(words: list[str], said: str) -> None:
    """Return if an evaluation by this command line is refused so."""
    with pytest.raises(ValueError, match=said):
        main(words)
    if dist.is_initialized():  # left open where a thread of another test still runs
        dist.destroy_process_group()
