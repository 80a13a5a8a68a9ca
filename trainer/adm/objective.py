"""What is minimised: a net and a batch of uint8 images go in, loss terms per image come out.

An objective owns noising and weighting; the loop never sees a schedule. All draws are keyed by
(seed, image index), so any split of a batch over ranks and micro-batches sees the same noise.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.adm import keyed
from trainer.adm.config import NO_LABEL, DiffusionConfig
from trainer.adm.diffusion import Diffusion
from trainer.adm.timesteps import TimestepSampler, UniformTimesteps


class Objective(Protocol):
    """What a run minimises."""

    #: How timesteps are drawn; a checkpoint keeps its state.
    timesteps: TimestepSampler

    def __call__(
        self, net: Callable[..., Tensor], images: Tensor, labels: Tensor, indices: Tensor
    ) -> dict[str, Tensor]:
        """A batch's terms per image (B,): "loss", which is minimised, "t" and what is shown."""
        ...


class Denoise:
    """The diffusion loss (paper, section 2) of a UNet.

    `net` is called as net(x_t, t), with y=labels if `class_conditional`, of which the share
    `label_dropout` is `NO_LABEL`, and with low_res=(B, 3, small_size, small_size), the images' area
    means, if `small_size` is given.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        timesteps: TimestepSampler,
        seed: int,
        class_conditional: bool,
        small_size: int | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        self.diffusion = Diffusion(config)
        self.timesteps, self.seed = timesteps, seed
        self.class_conditional, self.small_size = class_conditional, small_size
        self.label_dropout = label_dropout

    def __call__(
        self, net: Callable[..., Tensor], images: Tensor, labels: Tensor, indices: Tensor
    ) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W), int64 labels and image indices (B,) -> terms per image (B,).

        "loss" is weighted for the choice of "t". Detached: "unweighted", and its parts "mse" and
        "vb" as they apply.
        """
        x0 = to_range(images)
        t, weight = self.timesteps.draw(indices)
        noise = draw_noise(x0, indices, seed=self.seed)
        x_t = self.diffusion.q_sample(x0, t, noise)
        out = net(x_t, self.diffusion.original(t), **self._conditions(x0, labels, indices))
        terms = self.diffusion.losses(out, x0=x0, x_t=x_t, noise=noise, t=t)
        loss = terms["loss"] * weight
        parts = {name: term.detach() for name, term in terms.items()}
        return {**parts, "loss": loss, "unweighted": parts["loss"], "t": t}

    def _conditions(self, x0: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        conditions = {}
        if self.class_conditional:
            share, seed = self.label_dropout, self.seed
            conditions["y"] = drop_labels(labels, indices, share=share, seed=seed)
        if self.small_size is not None:
            conditions["low_res"] = low_resolution(x0, self.small_size)
        return conditions


class Classify:
    """Cross-entropy of a classifier on noised images, t uniform (paper, section 4)."""

    def __init__(self, config: DiffusionConfig, *, seed: int) -> None:
        self.diffusion = Diffusion(config)
        self.timesteps: TimestepSampler = UniformTimesteps(config.steps, seed=seed)
        self.seed = seed

    def __call__(
        self, net: Callable[..., Tensor], images: Tensor, labels: Tensor, indices: Tensor
    ) -> dict[str, Tensor]:
        """As `Denoise`: "loss", "t", and "acc1" and "acc5", 1 where the label is among the best."""
        x0 = to_range(images)
        t, _ = self.timesteps.draw(indices)
        x_t = self.diffusion.q_sample(x0, t, draw_noise(x0, indices, seed=self.seed))
        logits = net(x_t, self.diffusion.original(t))
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "t": t, **accuracies(logits.detach(), labels)}


def to_range(images: Tensor) -> Tensor:
    """uint8 pixels (B, C, H, W) -> float32 in [-1, 1], of the same shape."""
    return images.float() / 127.5 - 1


def low_resolution(x0: Tensor, size: int) -> Tensor:
    """What an upsampler enlarges: area means of images (B, C, H, W), shaped (B, C, size, size)."""
    return F.interpolate(x0, size, mode="area")


def drop_labels(labels: Tensor, indices: Tensor, *, share: float, seed: int) -> Tensor:
    """Labels (B,) of which about that share is `NO_LABEL`, drawn for each image by its index."""
    if not share:
        return labels
    u = keyed.uniform(indices, seed=seed, stream=keyed.LABEL_DROPOUT)
    return labels.masked_fill(u < share, NO_LABEL)


def draw_noise(x0: Tensor, indices: Tensor, *, seed: int) -> Tensor:
    """The standard normal noise of each image, shaped as x0."""
    return keyed.normal(indices, seed=seed, stream=keyed.NOISE, shape=tuple(x0.shape[1:]))


@torch.no_grad()
def accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per image (B,), 1.0 where the label has the best logit, and one of the best five."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"acc1": best[:, 0].float(), "acc5": best.any(dim=1).float()}
