"""Features of samples of a run in training: every rank draws parts and computes their features.

Image i is drawn from (seed 0, i) in a fixed part, as `python -m trainer.sample` draws it, so that
samples do not depend on the number of ranks, and runs of different seeds can be compared.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from data.progress import Progress
from trainer.adm.objective import low_resolution, to_range
from trainer.config.experiment import Config
from trainer.engine.copies import network_of
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.extraction import Share
from trainer.ranks.group import agreed, from_main
from trainer.sampling.draw import SamplerConfig, draw, to_pixels
from trainer.sampling.labels import Labels
from trainer.validation import ValidationSet

# The seed of labels and noise, whatever that of the run.
_SEED = 0


def features_of_samples(
    weights: Mapping[str, Tensor],
    *,
    config: Config,
    evaluator: Evaluator,
    enlarged: ValidationSet | None,
    mark: Callable[[str], None],
    check: Callable[[], None],
) -> tuple[Share, int]:
    """Draw this rank's samples with `weights`, as `[evaluation]` asks, and compute their features.

    Also returns how many samples were not finite; their features are those of black images. An
    upsampler enlarges the images of `enlarged`. `check` is called after every denoising step,
    equally often on all ranks. All ranks must call this.

    Raises:
        Refused: an image that is enlarged is damaged, or its shards were packed anew.
    """
    parts = _parts(config.evaluation.images, evaluator=evaluator)
    conditions = _conditions(parts, config=config, evaluator=evaluator, enlarged=enlarged)
    net, sampler = network_of(config, weights).eval(), sampler_of(config)
    steps, share, black = sampler.diffusion.steps, Share(kept=range(config.evaluation.images)), 0
    progress = Progress(
        total=len(parts) * steps,
        unit="denoising steps of the evaluation",
        shown=evaluator.world.is_main,
        say=evaluator.say,
    )

    def on_step() -> None:
        mark("drawing samples to evaluate")
        progress.advance()
        check()

    for indices, (labels, low_res) in zip(parts, conditions, strict=True):
        if not len(indices):  # other ranks have a part in this last turn
            for _ in range(steps):
                on_step()
            continue
        images = draw(
            net,
            indices,
            config=config.unet,
            sampler=sampler,
            labels=labels,
            low_res=low_res,
            on_step=on_step,
        )
        black += int((~images.isfinite().flatten(1).all(dim=1)).sum())
        share.add(int(indices[0]), evaluator.network.compute(to_pixels(images)))
    return share, black


def _parts(count: int, *, evaluator: Evaluator) -> list[Tensor]:
    """The indices of the images in this rank's parts; the last may be empty, so that all ranks have
    as many parts.
    """
    world, size = evaluator.world, evaluator.batch_size
    firsts = (first + world.rank * size for first in range(0, count, size * world.size))
    return [torch.arange(min(first, count), min(first + size, count)) for first in firsts]


def _conditions(
    parts: list[Tensor], *, config: Config, evaluator: Evaluator, enlarged: ValidationSet | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The labels (B,) and low-resolution images (B, 3, h, w) of each part, on the CPU."""
    model, asked, world = config.unet, config.evaluation, evaluator.world
    if enlarged is not None:
        from_main(enlarged.stream.check_unchanged)
        size = model.small_size
        assert size is not None
        batches = enlarged.stream.parts(
            images=asked.images, size=evaluator.batch_size, rank=world.rank, ranks=world.size
        )
        given = agreed(
            lambda: [(b.labels, low_resolution(to_range(b.images), size)) for b in batches]
        )
        told = [(None if model.num_classes is None else labels, low) for labels, low in given]
        return [*told, *[(None, None)] * (len(parts) - len(told))]
    if model.num_classes is None:
        return [(None, None)] * len(parts)
    labels = Labels(rule=asked.labels, classes=tuple(range(model.num_classes)), seed=_SEED)
    return [(labels.of(indices), None) for indices in parts]


def sampler_of(config: Config) -> SamplerConfig:
    """The sampler that `[evaluation]` asks for."""
    asked = config.evaluation
    return SamplerConfig.of(config, steps=asked.steps, seed=_SEED, cfg=asked.cfg)
