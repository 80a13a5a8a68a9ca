"""What is drawn (`SampleRequest`), by which networks and where to (`DrawJob`), part by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.adm.config import GuideAt
from trainer.adm.diffusion import Diffusion
from trainer.adm.objective import low_resolution, to_range
from trainer.adm.sampler import classifier_guidance
from trainer.networks import TrainedNetwork
from trainer.sampling.draw import SamplerConfig, draw, tile, to_pixels
from trainer.sampling.labels import Labels, columns
from trainer.sampling.options import Pixels
from trainer.sampling.output import Output
from trainer.sampling.samplefile import Samples, open_samples

# The most images in the PNG.
GRID = 100


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


@dataclass(frozen=True, kw_only=True)
class DrawJob:
    """One output: what is drawn, by which networks, and where it goes."""

    request: SampleRequest
    output: Output
    source: TrainedNetwork
    classifier: TrainedNetwork | None
    labels: Labels | None
    #: The names of the classes, by number; none where there are no classes.
    classes: Sequence[str]
    #: The images that an upsampler enlarges.
    low_res: Samples | None
    #: The end of its output's name, which tells it from those of other scales: "-scale0.5".
    variant: str

    def all_labels(self) -> NDArray[np.int64] | None:
        """The labels of all images, (N,); None where there are no classes."""
        if self.labels is None:
            return None
        return self.labels.of(torch.arange(self.request.images)).numpy()

    def recorded(self, part: int) -> NDArray[np.int64]:
        """The labels (B,) of a part on disk: zeros where there are no classes."""
        indices = self.request.indices(part)
        found = torch.zeros_like(indices) if self.labels is None else self.labels.of(indices)
        return found.numpy()

    def conditions(self, first: int, last: int, *, device: torch.device) -> Tensor | None:
        """The low-resolution images [first, last) in [-1, 1], float32 (B, 3, h, w), or None.

        Larger ones are reduced to their area means, as in training.
        """
        size = self.source.config.unet.small_size
        if self.low_res is None or size is None:
            return None
        pixels = torch.from_numpy(self.low_res.images(first, last)).to(device)
        images = to_range(pixels.permute(0, 3, 1, 2))
        return images if images.shape[2] == size else low_resolution(images, size)

    def grid(self, whole: Path) -> NDArray[np.uint8]:
        """The first images of the output, uint8 (3, H, W), each beside its low resolution."""
        images = open_samples(whole).images(0, GRID).transpose(0, 3, 1, 2)
        low_res = self.conditions(0, len(images), device=torch.device("cpu"))
        if low_res is not None:
            small = to_pixels(low_res).numpy()
            zoom = images.shape[2] // small.shape[2]
            images = np.concatenate((small.repeat(zoom, 2).repeat(zoom, 3), images), axis=3)
        labels = self.all_labels()
        return tile(images, columns=columns(None if labels is None else labels[:GRID]))


class PartSampler:
    """Draws the parts of a job with networks that are on the device."""

    def __init__(
        self, job: DrawJob, *, net: nn.Module, classifier: nn.Module | None, device: torch.device
    ) -> None:
        request = job.request
        self._job, self._net, self._device = job, net, device
        self._classifier = classifier if request.scale else None
        self._sampler = SamplerConfig(
            diffusion=Diffusion(job.source.config.diffusion, respacing=request.steps),
            seed=request.seed,
            eta=request.eta,
            cfg=request.cfg,
            guide_at=request.guide_at,
        )

    @property
    def steps(self) -> int:
        """Denoising steps of each image."""
        return self._sampler.diffusion.steps

    def draw(
        self, part: int, *, on_step: Callable[[], None]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """One part: images uint8 (B, H, W, 3) and their labels (B,), zeros if there are none.

        Raises:
            ValueError: an image is not finite, or a low-resolution one is damaged.
        """
        job, device = self._job, self._device
        indices, model, guidance = job.request.indices(part), job.source.config.unet, None
        labels = None if job.labels is None else job.labels.of(indices).to(device)
        if self._classifier is not None:
            assert labels is not None
            guidance = classifier_guidance(self._classifier, labels, scale=job.request.scale)
        with torch.no_grad():
            images = draw(
                self._net,
                indices,
                config=model,
                sampler=self._sampler,
                labels=labels if model.num_classes is not None else None,
                low_res=job.conditions(int(indices[0]), int(indices[-1]) + 1, device=device),
                guidance=guidance,
                on_step=on_step,
            )
        if not images.isfinite().all():
            raise ValueError(
                f"images {indices.tolist()[:3]}... are not finite: draw in another --precision "
                "(bf16 or fp32) to another --out, or check the weights"
            )
        pixels = to_pixels(images, truncate=job.request.pixels == "adm")
        return pixels.permute(0, 2, 3, 1).cpu().numpy(), job.recorded(part)
