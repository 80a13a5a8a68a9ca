"""Samples of a run that trains, as features: every rank draws its parts and computes theirs.

Image i is drawn from (seed 0, i) in a fixed part, as `python -m trainer.sample` draws it, so that
samples do not depend on the number of ranks, and runs of different seeds can be compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.progress import Progress
from trainer.adm.config import UNetConfig
from trainer.adm.objective import low_resolution, to_range
from trainer.config import Config
from trainer.copies import network_of
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.extraction import Share
from trainer.ranks.group import agreed
from trainer.sampling.draw import SamplerConfig, draw, to_pixels
from trainer.sampling.labels import Labels
from trainer.validation import ValidationSet

# Of labels and noise.
_SEED = 0


@dataclass(frozen=True)
class Conditions:
    """What is told of a part: its classes (B,), and low-resolution images (B, 3, h, w)."""

    labels: Tensor | None = None
    low_res: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """Draws the samples that `[evaluation]` asks for. All ranks make each call together."""

    config: Config
    evaluator: Evaluator
    #: The images that an upsampler enlarges.
    enlarged: ValidationSet | None
    mark: Callable[[str], None]
    #: Called after every denoising step, equally often on all ranks.
    check: Callable[[], None]

    def conditions(self) -> list[Conditions]:
        """What is told of each of this rank's parts, on the host.

        Raises:
            Refused: an image that is enlarged is damaged.
        """
        world, part, count = self.evaluator.world, self.evaluator.batch, self._count
        if self.enlarged is not None:
            small_size = self._model.small_size
            assert small_size is not None
            parts = self.enlarged.stream.parts(
                images=count, size=part, rank=world.rank, ranks=world.size
            )
            is_conditional = self._model.num_classes is not None
            return agreed(
                lambda: [
                    Conditions(
                        labels=batch.labels if is_conditional else None,
                        low_res=low_resolution(to_range(batch.images), small_size),
                    )
                    for batch in parts
                ]
            )
        if self._model.num_classes is None:
            return []
        classes = tuple(range(self._model.num_classes))
        labels = Labels(rule=self.config.evaluation.labels, classes=classes, seed=_SEED)
        return [Conditions(labels=labels.of(each)) for each in self._parts() if len(each)]

    def draw(self, tensors: Mapping[str, Tensor]) -> tuple[Share, int]:
        """Features of this rank's samples by a network of these weights.

        Also how many samples were not finite; these are black.

        Raises:
            Refused: as `conditions`.
        """
        device, conditions = self.evaluator.device, self.conditions()
        net = network_of(self.config, tensors).eval()
        sampler, parts = sampler_of(self.config), self._parts()
        steps, share, black = sampler.diffusion.steps, Share(), 0
        progress = Progress(
            total=len(parts) * steps,
            unit="denoising steps of the evaluation",
            shown=self.evaluator.world.is_main,
            say=self.evaluator.say,
        )

        def on_step() -> None:
            self.mark("drawing samples to evaluate")
            progress.advance()
            self.check()

        for turn, indices in enumerate(parts):
            if not len(indices):  # the others have a part in the last turn
                for _ in range(steps):
                    on_step()
                continue
            told = conditions[turn] if conditions else Conditions()
            images = draw(
                net,
                indices.to(device),
                config=self._model,
                sampler=sampler,
                labels=None if told.labels is None else told.labels.to(device),
                low_res=None if told.low_res is None else told.low_res.to(device),
                on_step=on_step,
            )
            black += int((~images.isfinite().flatten(1).all(dim=1)).sum())
            share.add(int(indices[0]), self.evaluator.network.compute(to_pixels(images)))
        return share, black

    @property
    def _model(self) -> UNetConfig:
        assert isinstance(self.config.model, UNetConfig)
        return self.config.model

    @property
    def _count(self) -> int:
        return self.config.evaluation.images

    def _parts(self) -> list[Tensor]:
        """The images of this rank's parts, as many parts on every rank; the last may be empty."""
        world, part, count = self.evaluator.world, self.evaluator.batch, self._count
        firsts = (first + world.rank * part for first in range(0, count, part * world.size))
        return [torch.arange(min(first, count), min(first + part, count)) for first in firsts]


def sampler_of(config: Config) -> SamplerConfig:
    """The sampler that `[evaluation]` asks for."""
    asked = config.evaluation
    return SamplerConfig.of(config, steps=asked.steps, seed=_SEED, cfg=asked.cfg)
