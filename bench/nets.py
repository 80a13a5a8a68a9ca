"""The networks that `bench.cpu_step` and `bench.gpu` compare, of one configuration.

Ours, guided-diffusion's (from a checkout, by path) and diffusers' (where it is installed): the same
widths, blocks, attention and embedding by scale and shift. Each is a function of noised images,
timesteps and labels.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.adm.config import ClassifierConfig, Kernels, UNetConfig
from trainer.adm.norm import use_kernels
from trainer.adm.unet import UNet

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Net:
    """A network and how it is called."""

    module: nn.Module
    forward: Forward

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.module.parameters())


def ours(
    config: UNetConfig,
    *,
    kernels: Kernels = "plain",
    layout: torch.memory_format = torch.channels_last,
) -> Net:
    """The network of this project."""
    net = UNet(config)
    net.layout = layout
    use_kernels(net, kernels)
    return Net(net, lambda x, t, y: net(x, t, y))


def guided_diffusion(config: UNetConfig, *, path: Path, fp16: bool = False) -> Net:
    """The network of a checkout of openai/guided-diffusion.

    Raises:
        ValueError: there is no checkout at `path`.
    """
    net = _guided_diffusion(path).UNetModel(
        image_size=config.image_size,
        in_channels=3,
        model_channels=config.channels,
        out_channels=config.out_channels,
        num_res_blocks=config.blocks,
        attention_resolutions=tuple(config.image_size // size for size in config.attention),
        dropout=config.dropout,
        channel_mult=config.channel_mult,
        num_classes=config.num_classes,
        use_fp16=fp16,
        num_head_channels=config.head_channels,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=config.qkv == "new",
    )
    if fp16:
        net.convert_to_fp16()
    return Net(net, lambda x, t, y: net(x, t, y))


def guided_diffusion_classifier(config: ClassifierConfig, *, path: Path) -> nn.Module:
    """The classifier of a checkout of openai/guided-diffusion, in fp16 on a GPU."""
    fp16 = torch.cuda.is_available()
    net: Any = _guided_diffusion(path).EncoderUNetModel(
        image_size=config.image_size,
        in_channels=3,
        model_channels=config.channels,
        out_channels=config.num_classes,
        num_res_blocks=config.blocks,
        attention_resolutions=tuple(config.image_size // size for size in config.attention),
        channel_mult=config.channel_mult,
        use_fp16=fp16,
        num_head_channels=config.head_channels,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool=config.pool,
    )
    if fp16:
        net.convert_to_fp16()
    module: nn.Module = net
    return module


def _guided_diffusion(path: Path) -> Any:
    if not (path / "guided_diffusion" / "unet.py").is_file():
        raise ValueError(f"--guided-diffusion {path}: it has no guided_diffusion/unet.py")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module("guided_diffusion.unet")


def diffusers(config: UNetConfig) -> Net:
    """The same network of diffusers.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    model: Any = importlib.import_module("diffusers").UNet2DModel
    attends = [size in config.attention for size in config.resolutions]
    net = model(
        sample_size=config.image_size,
        in_channels=3,
        out_channels=config.out_channels,
        layers_per_block=config.blocks,
        block_out_channels=config.level_channels,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.head_channels,
        dropout=config.dropout,
        num_class_embeds=config.num_classes,
    )
    return Net(net, lambda x, t, y: net(x, t, y).sample)


def others(config: UNetConfig, *, path: Path | None) -> dict[str, Net]:
    """Those of guided-diffusion, where a checkout is given, and of diffusers, where installed."""
    found = {}
    if path is not None:
        found["guided-diffusion"] = guided_diffusion(config, path=path)
    try:
        found["diffusers"] = diffusers(config)
    except ModuleNotFoundError as error:
        print(f"diffusers is left out: {error}")
    return found


def inputs(config: UNetConfig, *, images: int, device: torch.device) -> tuple[Tensor, ...]:
    """Noised images (B, 3, H, W), timesteps (B,) and labels (B,)."""
    x = torch.randn(images, 3, config.image_size, config.image_size, device=device)
    t = torch.arange(images, device=device) * 7 % 1000
    return x, t, t % (config.num_classes or 1)
