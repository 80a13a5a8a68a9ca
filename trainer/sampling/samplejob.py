"""One output of sampling: what is drawn, by which networks, and where it goes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.adm.config import UNetConfig
from trainer.networks import TrainedNetwork
from trainer.sampling.draw import tile, to_pixels
from trainer.sampling.labels import Labels, columns
from trainer.sampling.output import Output
from trainer.sampling.parts import SampleRequest, conditions
from trainer.sampling.samplefile import Samples, open_samples

# The most images in the PNG.
GRID = 100


@dataclass(frozen=True, kw_only=True)
class DrawJob:
    """One output: what is drawn, by which networks, and where it goes."""

    request: SampleRequest
    output: Output
    source: TrainedNetwork
    classifier: TrainedNetwork | None
    labels: Labels | None
    #: The images that an upsampler enlarges.
    low_res: Samples | None
    #: What tells its output from those of other scales: the end of its name.
    variant: str

    @property
    def model(self) -> UNetConfig:
        """The network's configuration."""
        assert isinstance(self.source.config.model, UNetConfig)
        return self.source.config.model

    def all_labels(self) -> NDArray[np.int64] | None:
        """The labels of all images, (N,); None where there are no classes."""
        if self.labels is None:
            return None
        return self.labels.of(torch.arange(self.request.images)).numpy()

    def grid(self, whole: Path) -> NDArray[np.uint8]:
        """The first images of the output, uint8 (3, H, W), each beside its low resolution."""
        images = open_samples(whole).images(0, GRID).transpose(0, 3, 1, 2)
        if self.low_res is not None and self.model.small_size is not None:
            pixels = self.low_res.images(0, len(images))
            small_size, cpu = self.model.small_size, torch.device("cpu")
            small = to_pixels(conditions(pixels, small_size=small_size, device=cpu)).numpy()
            zoom = self.model.image_size // small_size
            images = np.concatenate((small.repeat(zoom, 2).repeat(zoom, 3), images), axis=3)
        labels = self.all_labels()
        return tile(images, columns=columns(None if labels is None else labels[:GRID]))
