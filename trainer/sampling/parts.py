"""A request for samples, cut into parts, and what draws one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.adm.diffusion import Diffusion
from trainer.adm.objective import low_resolution, to_range
from trainer.adm.sampler import Guidance, GuideAt, classifier_guidance
from trainer.config import Config
from trainer.sampling.draw import SamplerConfig, draw, to_pixels
from trainer.sampling.labels import Labels
from trainer.sampling.samplefile import Samples

Pixels = Literal["round", "adm"]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What is drawn: everything that decides the pixels. The output records it."""

    images: int
    batch: int
    seed: int
    steps: str
    eta: float | None
    #: The factor on the classifier's gradient; 0 without a classifier.
    scale: float
    guide_at: GuideAt
    #: The factor of classifier-free guidance; None without.
    cfg: float | None
    #: The rule of the labels (`Labels`) and the classes that it chooses from.
    labels: str | None
    classes: tuple[int, ...] | None
    #: To the nearest grey level, or as the published samples: to the one below.
    pixels: Pixels
    precision: str | None
    device: str
    #: 1: keyed by (seed, image, step), as in version 0.1; 2, of upsamplers: by the image size too.
    noise: int
    #: Checksums of the weights, and of the images that an upsampler enlarges.
    sources: tuple[str, ...]
    low_res: str | None

    def indices(self, part: int) -> Tensor:
        """The image indices of one part, (B,) int64."""
        return torch.arange(part * self.batch, min((part + 1) * self.batch, self.images))


class PartSampler:
    """Draws the parts of a request with networks that are on the device.

    `low_res` are the images that an upsampler enlarges, or large ones whose area means it does.
    """

    def __init__(
        self,
        request: SampleRequest,
        *,
        config: Config,
        net: nn.Module,
        classifier: nn.Module | None,
        labels: Labels | None,
        low_res: Samples | None,
        device: torch.device,
    ) -> None:
        self._request, self._config = request, config.unet
        self._net = net
        self._classifier = classifier if request.scale else None
        self._labels, self._low_res = labels, low_res
        self._device = device
        self._sampler_config = SamplerConfig(
            diffusion=Diffusion(config.diffusion, respacing=request.steps),
            seed=request.seed,
            eta=request.eta,
            cfg=request.cfg,
            guide_at=request.guide_at,
        )

    @property
    def steps(self) -> int:
        """Denoising steps of each image."""
        return self._sampler_config.diffusion.steps

    def draw(
        self, part: int, *, on_step: Callable[[], None]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """One part: images uint8 (B, H, W, 3) and their labels (B,), zeros if there are none.

        Raises:
            ValueError: an image is not finite, or a low-resolution one is damaged.
        """
        indices = self._request.indices(part)
        labels = None if self._labels is None else self._labels.of(indices)
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
                "(bf16 or fp32) to another --out, or check the weights"
            )
        pixels = to_pixels(images, truncate=self._request.pixels == "adm")
        return pixels.permute(0, 2, 3, 1).cpu().numpy(), recorded(self._labels, indices)

    def _guidance(self, labels: Tensor | None) -> Guidance | None:
        if self._classifier is None:
            return None
        assert labels is not None
        return classifier_guidance(self._classifier, labels, scale=self._request.scale)

    def _conditions(self, indices: Tensor) -> Tensor | None:
        if self._low_res is None:
            return None
        assert self._config.small_size is not None
        pixels = self._low_res.images(int(indices[0]), int(indices[-1]) + 1)
        return conditions(pixels, small_size=self._config.small_size, device=self._device)


def recorded(labels: Labels | None, indices: Tensor) -> NDArray[np.int64]:
    """The labels (B,) of a part on disk: zeros where there are no classes."""
    found = torch.zeros_like(indices) if labels is None else labels.of(indices)
    return found.numpy()


def conditions(pixels: NDArray[np.uint8], *, small_size: int, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> what an upsampler is told, float32 (B, 3, small_size, small_size).

    Larger images are reduced to their area means, as in training.
    """
    images = to_range(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
    return images if images.shape[2] == small_size else low_resolution(images, small_size)
