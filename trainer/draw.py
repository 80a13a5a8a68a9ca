"""Drawing images: a network, labels and image numbers go in, uint8 pictures come out.

Every draw of noise is keyed by (seed, image number, step), and images are drawn in fixed batches,
so image i is the same whichever rank draws it and however many ranks there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from launch.world import World
from trainer import ema
from trainer.adm.diffusion import Diffusion
from trainer.adm.sampler import Guidance, ancestral, ddim, start, step_noise
from trainer.adm.unet import UNet, UNetConfig
from trainer.config import Config
from trainer.engine import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How the noise becomes an image."""

    diffusion: Diffusion
    seed: int
    #: DDIM with this eta; None for the ancestral sampler.
    eta: float | None = None


def draw(
    net: nn.Module,
    numbers: Tensor,
    *,
    config: UNetConfig,
    walk: Walk,
    labels: Tensor | None = None,
    low_res: Tensor | None = None,
    guidance: Guidance | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw the images of these numbers, (B,) int64 on the device: uint8 (B, 3, H, W).

    `labels` (B,) for a class-conditional network, `low_res` (B, 3, h, w) in [-1, 1] for an
    upsampler. `on_step` is called after every step of the walk.
    """
    shape = (3, config.image_size, config.image_size)
    x = start(numbers, seed=walk.seed, shape=shape)
    noise = step_noise(numbers, seed=walk.seed, shape=shape)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t, labels, low_res)
        return out

    if walk.eta is None:
        steps = ancestral(walk.diffusion, denoise, x, noise=noise, guidance=guidance)
    else:
        steps = ddim(walk.diffusion, denoise, x, noise=noise, eta=walk.eta, guidance=guidance)
    for _, x in steps:  # noqa: B007
        on_step()
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def tile(images: NDArray[np.uint8], *, columns: int | None = None) -> NDArray[np.uint8]:
    """Lay uint8 (N, 3, H, W) out on a grid (3, rows H, columns W), black where empty."""
    count, _, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, 3, height, width), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, 3, height, width).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(grid.reshape(3, rows * height, columns * width))


def draw_grid(
    engine: Engine, *, config: Config, world: World, low_res: Tensor | None = None
) -> NDArray[np.uint8] | None:
    """The run's grid from its first EMA, uint8 (3, H, W), on the main rank; None on others.

    All ranks must call it. `low_res` (N, 3, h, w) in [-1, 1] on every rank feeds an upsampler.
    """
    assert isinstance(config.model, UNetConfig)
    net = UNet(config.model).to(engine.device)
    net.load_state_dict(dict(engine.gather(ema.key(config.training.ema[0]))))
    net = net.to(DTYPES[config.training.precision]).eval()
    numbers = torch.arange(world.rank, config.intervals.samples_count, world.size)
    respacing = config.intervals.samples_steps
    walk = Walk(
        diffusion=Diffusion(config.diffusion, respacing=respacing),
        seed=config.training.seed,
        eta=0.0 if respacing.startswith("ddim") else None,
    )
    classes = config.model.num_classes
    labels = None if classes is None else _spread(numbers, config.intervals.samples_count, classes)
    mine = np.zeros((0, 3, config.model.image_size, config.model.image_size), np.uint8)
    if len(numbers):
        with torch.no_grad():
            mine = (
                draw(
                    net,
                    numbers.to(engine.device),
                    config=config.model,
                    walk=walk,
                    labels=None if labels is None else labels.to(engine.device),
                    low_res=None if low_res is None else low_res[numbers.to(low_res.device)],
                )
                .cpu()
                .numpy()
            )
    parts: list[NDArray[np.uint8]] = [mine] * world.size
    dist.all_gather_object(parts, mine)
    if not world.is_main:
        return None
    images = np.empty((config.intervals.samples_count, *mine.shape[1:]), np.uint8)
    for rank, part in enumerate(parts):
        images[rank :: world.size] = part
    return tile(images)


def _spread(numbers: Tensor, count: int, classes: int) -> Tensor:
    """Labels of a grid: all classes in turn where they fit, else evenly spread ones."""
    return numbers % classes if classes <= count else numbers * classes // count
