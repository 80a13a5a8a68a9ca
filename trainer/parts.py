"""A request for samples, cut into parts, and what draws one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.adm.config import UNetConfig
from trainer.adm.diffusion import Diffusion
from trainer.adm.sampler import Guidance, classifier_guidance
from trainer.draw import SamplerConfig, draw, to_pixels
from trainer.networks import TrainedNetwork


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What is drawn: everything that decides the pixels. Parts of two requests never mix."""

    images: int
    batch: int
    seed: int
    steps: str
    eta: float | None
    scale: float
    classes: tuple[int, ...] | None
    precision: str | None
    device: str
    #: Checksums of the weights, and of the images that an upsampler enlarges.
    sources: tuple[str, ...]
    low_res: str | None

    def indices(self, part: int) -> Tensor:
        """The image indices of one part, (B,) int64."""
        return torch.arange(part * self.batch, min((part + 1) * self.batch, self.images))

    @property
    def parts(self) -> int:
        """How many parts the images are drawn in."""
        return -(-self.images // self.batch)

    def labels(self, indices: Tensor) -> Tensor | None:
        """The classes (B,) of indices (B,), in turn: equally many of each."""
        if self.classes is None:
            return None
        return torch.tensor(self.classes)[indices % len(self.classes)]

    def recorded(self, indices: Tensor) -> Tensor:
        """The labels (B,) that the file holds: zeros where there are no classes."""
        labels = self.labels(indices)
        return torch.zeros_like(indices) if labels is None else labels


class PartSampler:
    """The networks of a request, ready to draw any of its parts."""

    def __init__(
        self,
        request: SampleRequest,
        *,
        source: TrainedNetwork,
        classifier: TrainedNetwork | None,
        low_res: NDArray[np.uint8] | None,
        device: torch.device,
    ) -> None:
        assert isinstance(source.config.model, UNetConfig)
        self._request = request
        self._config = source.config.model
        self._net = source.net(device=device, precision=request.precision)
        self._classifier = None
        if classifier is not None:
            self._classifier = classifier.net(device=device, precision=request.precision)
        self._low_res = low_res
        self._device = device
        self._sampler_config = SamplerConfig(
            diffusion=Diffusion(source.config.diffusion, respacing=request.steps),
            seed=request.seed,
            eta=request.eta,
        )

    @property
    def steps(self) -> int:
        """Denoising steps of each image."""
        return self._sampler_config.diffusion.steps

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self._config.image_size

    def draw(
        self, part: int, *, on_step: Callable[[], None]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """One part: images uint8 (B, 3, H, W) and their labels (B,), zeros if there are none.

        Raises:
            ValueError: an image is not finite.
        """
        indices = self._request.indices(part)
        labels = self._request.labels(indices)
        on_device = None if labels is None else labels.to(self._device)
        with torch.no_grad():
            images = draw(
                self._net,
                indices.to(self._device),
                config=self._config,
                sampler=self._sampler_config,
                labels=on_device if self._config.num_classes is not None else None,
                low_res=self._conditions(indices),
                guidance=self._guidance(on_device),
                on_step=on_step,
            )
        if not images.isfinite().all():
            raise ValueError(
                f"images {indices.tolist()[:3]}... are not finite: draw in another --precision "
                "(bf16 or fp32), or check the weights"
            )
        return to_pixels(images).cpu().numpy(), self._request.recorded(indices).numpy()

    def _guidance(self, labels: Tensor | None) -> Guidance | None:
        if self._classifier is None:
            return None
        assert labels is not None
        return classifier_guidance(self._classifier, labels, scale=self._request.scale)

    def _conditions(self, indices: Tensor) -> Tensor | None:
        if self._low_res is None:
            return None
        pixels = torch.from_numpy(self._low_res[indices.numpy()]).to(self._device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
