"""Drawing images: a network, labels and image indices go in, uint8 pictures come out.

Every draw of noise is keyed by (seed, image index, step), and images are drawn in fixed batches,
so image i is the same whichever rank draws it and however many ranks there are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.config import naming
from data.mixture import Dataset
from data.stream import Batch, Stream
from trainer.adm.config import GuideAt, UNetConfig, check
from trainer.adm.diffusion import Diffusion, Net
from trainer.adm.objective import low_resolution, to_range
from trainer.adm.sampler import (
    Guidance,
    ancestral,
    classifier_free,
    ddim,
    start,
    step_noise,
)
from trainer.config.experiment import Config
from trainer.config.sections import IntervalConfig
from trainer.engine.copies import network_of
from trainer.ranks.group import agreed, gather_to_main
from trainer.ranks.world import World


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the noise becomes an image."""

    diffusion: Diffusion
    seed: int
    #: DDIM with this eta; None for the ancestral sampler.
    eta: float | None = None
    #: Classifier-free guidance by this factor; None, or 1, for none.
    cfg: float | None = None
    #: Where a classifier's gradient is taken.
    guide_at: GuideAt = "x_t"

    def __post_init__(self) -> None:
        is_known = self.eta is None or self.guide_at == "x_t"
        check(is_known, "guide_at", self.guide_at, '"x_t" with eta: DDIM guides there')

    @classmethod
    def of(
        cls, config: Config, *, steps: str, seed: int, cfg: float | None = None
    ) -> "SamplerConfig":
        """The sampler of a network's config; `steps` such as "250", or "ddim25" for DDIM's.

        Raises:
            ValueError: `steps` cannot be met, or `cfg` guides a network that cannot do without
                labels.
        """
        is_able = cfg in (None, 1) or config.training.label_dropout > 0
        check(is_able, "cfg", cfg, "absent for a network trained without training.label_dropout")
        return cls(
            diffusion=Diffusion(config.diffusion, respacing=steps),
            seed=seed,
            eta=default_eta(steps),
            cfg=cfg,
        )


def default_eta(steps: str) -> float | None:
    """The eta where none is given: 0 for steps such as "ddim25", None (ancestral) for others."""
    return 0.0 if steps.startswith("ddim") else None


def draw(
    net: nn.Module,
    indices: Tensor,
    *,
    config: UNetConfig,
    sampler: SamplerConfig,
    labels: Tensor | None = None,
    low_res: Tensor | None = None,
    guidance: Guidance | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw the images of these indices, (B,) int64: float32 (B, 3, H, W) on the net's device.

    `labels` (B,) for a class-conditional network, `low_res` (B, 3, h, w) in [-1, 1] for an
    upsampler. `on_step` is called after every denoising step.

    Raises:
        ValueError: there are no labels that `cfg` could guide to.
    """
    device = next(net.parameters()).device
    indices = indices.to(device)
    labels = None if labels is None else labels.to(device)
    low_res = None if low_res is None else low_res.to(device)
    shape = (3, config.image_size, config.image_size)
    # An upsampler with the seed of its base must not get the same noise.
    stage = 0 if config.small_size is None else config.image_size
    x = start(indices, seed=sampler.seed, shape=shape, stage=stage)
    noise = step_noise(indices, seed=sampler.seed, shape=shape, stage=stage)
    denoise = _denoiser(net, labels, low_res, cfg=sampler.cfg)
    if sampler.eta is None:
        at = sampler.guide_at
        steps = ancestral(
            sampler.diffusion, denoise, x, noise=noise, guidance=guidance, guide_at=at
        )
    else:
        steps = ddim(sampler.diffusion, denoise, x, noise=noise, eta=sampler.eta, guidance=guidance)
    for _, x in steps:  # noqa: B007
        on_step()
    return x


def _denoiser(
    net: nn.Module, labels: Tensor | None, low_res: Tensor | None, *, cfg: float | None
) -> Net:
    """The net as a function of x, t and labels, with classifier-free guidance by `cfg` if any."""

    def denoise(x: Tensor, t: Tensor, y: Tensor | None = labels) -> Tensor:
        out: Tensor = net(x, t, y, low_res)
        return out

    if cfg is None or cfg == 1:
        return denoise
    if labels is None:
        raise ValueError(f"cfg = {cfg}: guides to labels: give them, or leave it out")
    return classifier_free(denoise, labels, scale=cfg)


def to_pixels(images: Tensor, *, truncate: bool = False) -> Tensor:
    """float images (B, C, H, W) in [-1, 1] -> uint8; NaN becomes black.

    Rounded to the nearest grey level, or with `truncate` down, as the published samples are.
    """
    levels = (images.nan_to_num(nan=-1.0) + 1) * 127.5
    return (levels if truncate else levels.round()).clamp(0, 255).to(torch.uint8)


def tile(images: NDArray[np.uint8], *, columns: int | None = None) -> NDArray[np.uint8]:
    """Lay images, uint8 (N, 3, H, W), out as one picture (3, height, width).

    Images below 32 px are enlarged by whole factors, so that they can be seen.
    """
    count, _, height, width = images.shape
    zoom = max(1, 32 // height)
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, 3, height * zoom + 2, width * zoom + 2), np.uint8)
    grid[:count, :, 1:-1, 1:-1] = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    _, _, tall, wide = grid.shape
    grid = grid.reshape(rows, columns, 3, tall, wide).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(grid.reshape(3, rows * tall, columns * wide))


def draw_grid(
    weights: Mapping[str, Tensor],
    *,
    config: Config,
    world: World,
    originals: Batch | None,
    on_step: Callable[[], None],
) -> NDArray[np.uint8] | None:
    """The picture of a run's samples, uint8 (3, H, W), on the main rank; None on the others.

    All ranks must call it. The network uses `weights` without a copy, on their device and in their
    dtype. An upsampler enlarges `originals`, made smaller: those of `grid_originals`. `on_step` is
    called equally often on all ranks.
    """
    model = config.unet
    net = network_of(config, weights).eval()
    every = config.intervals
    indices = torch.tensor(_grid_indices(every, world=world))
    labels = _spread(indices, every.samples_count, model.num_classes)
    low_res = None
    if originals is not None and model.small_size is not None:
        x0 = to_range(originals.images.to(next(net.parameters()).device))
        low_res = low_resolution(x0, model.small_size)
        labels = None if labels is None else originals.labels
    sampler = SamplerConfig.of(config, steps=every.samples_steps, seed=config.training.seed)
    steps = sampler.diffusion.steps
    # The training's state stays where it is, so a grid may take no more room than a step.
    size = config.training.micro_batch
    with torch.no_grad():
        mine = [
            draw(
                net,
                indices[part],
                config=model,
                sampler=sampler,
                labels=None if labels is None else labels[part],
                low_res=None if low_res is None else low_res[part],
                on_step=on_step,
            ).cpu()
            for part in torch.arange(len(indices)).split(size)
        ]
    # The main rank draws the most images; the others make up its number of calls.
    for _ in range((-(-every.samples_count // (size * world.size)) - len(mine)) * steps):
        on_step()
    return _collect(to_pixels(torch.cat(mine)).numpy(), count=every.samples_count, world=world)


def _grid_indices(every: IntervalConfig, *, world: World) -> range:
    """The images of the grid that this rank draws: every `world.size`-th.

    A rank that would have none draws one that is not shown, so that all ranks do the same.
    """
    return range(world.rank, max(every.samples_count, world.rank + 1), world.size)


def _collect(mine: NDArray[np.uint8], *, count: int, world: World) -> NDArray[np.uint8] | None:
    """The grid of all ranks' images, on the main rank."""
    parts = gather_to_main(mine)
    if parts is None:
        return None
    images = np.empty((count, *mine.shape[1:]), np.uint8)
    for rank, part in enumerate(parts[:count]):
        images[rank :: world.size] = part
    return tile(images)


def _spread(indices: Tensor, count: int, classes: int | None) -> Tensor | None:
    """Labels of the grid's images: all classes in turn if they fit, else classes evenly spread."""
    if classes is None:
        return None
    return indices % classes if classes <= count else indices * classes // count % classes


def check_grids(config: Config, shards: Dataset, *, ranks: int) -> None:
    """Raise ValueError where data.shards is too small for upsampled grids."""
    every, images = config.intervals, shards.count
    if every.samples is None or config.unet.small_size is None:
        return
    needed = max(every.samples_count, ranks)
    if images < needed:
        ways = "lower intervals.samples_count" if images >= ranks else "start fewer ranks"
        raise ValueError(
            f"intervals.samples_count = {every.samples_count}: on {ranks} ranks an upsampler's "
            f"grid enlarges {needed} images, data.shards has {images}: {ways}, "
            "or draw no grids (--unset intervals.samples)"
        )


def grid_originals(config: Config, stream: Stream, *, world: World) -> Batch | None:
    """This rank's share of the shards' first images, which an upsampler enlarges in its grids.

    None where no grid needs them. All ranks must call it.

    Raises:
        Refused, Broken: one of them is damaged or cannot be read.
    """
    if config.intervals.samples is None or config.unet.small_size is None:
        return None
    mine = _grid_indices(config.intervals, world=world)

    def load() -> Batch:
        with naming(
            "an upsampler's grids enlarge the first images (none: --unset intervals.samples)"
        ):
            return stream.load(mine, once=True)

    return agreed(load)
