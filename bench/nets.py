"""The networks that `bench.cpu_step` and `bench.gpu` compare, of one configuration.

Ours, guided-diffusion's (from a checkout, by path) and diffusers' (where it is installed): the same
widths, blocks, attention and embedding by scale and shift. Each is a function of noised images,
timesteps and labels.

And two ways, not in use, to convolve a map that was doubled. A 3 x 3 kernel meets only 2 x 2 values
of the map before: with the sums of its weights, the result takes 4 instead of 9 multiplications.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import diffusers_format
from trainer.adm.blocks import ResidualBlock, residual_sum, resize
from trainer.adm.config import ClassifierConfig, Kernels, NetworkConfig, UNetConfig
from trainer.adm.norm import use_kernels
from trainer.adm.unet import UNet, build

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Doubled = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Net:
    """A network and how it is called."""

    module: nn.Module
    forward: Forward

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.module.parameters())


def drawn(net: Net) -> Net:
    """With weights in the place of zeros, of which all gradients are zero as training begins.

    A GPU multiplies zeros with less power, and faster; diffusers' network has none.
    """
    for parameter in net.module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def ours(
    config: UNetConfig,
    *,
    kernels: Kernels = "plain",
    layout: torch.memory_format = torch.channels_last,
    doubled: Doubled | None = None,
) -> Net:
    """The network of this project, its doubled maps convolved by `doubled` if that is given."""
    net = UNet(config)
    net.layout = layout
    use_kernels(net, kernels)
    for block in net.modules():
        if doubled and isinstance(block, ResidualBlock) and block.resample == "up":
            block.__class__ = _Doubling
            assert isinstance(block, _Doubling)
            block.doubled = doubled
    return Net(net, lambda x, t, y: net(x, t, y))


class _Doubling(ResidualBlock):
    """A residual block that doubles its map within its convolution."""

    doubled: Doubled

    def _block(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, conv = self.in_layers[0], self.in_layers[2]
        assert isinstance(conv, nn.Conv2d)
        h = self.doubled(norm(x, silu=True), conv.weight)
        h = self._condition(h, self.emb_layers(emb), conv.bias)
        return residual_sum(self.skip_connection(resize(x, "up")), h, self.rescale)


def by_phases(x: Tensor, weight: Tensor) -> Tensor:
    """The 3 x 3 convolution of a doubled map as four of 2 x 2: each gives every second position.

    x (B, C, H, W), weight (O, C, 3, 3) -> (B, O, 2 H, 2 W), channels last.
    """
    height, width, channels = x.shape[2], x.shape[3], len(weight)
    kernels = [both for rows in _halves(weight, 2) for both in _halves(rows, 3)]
    y = F.conv2d(x, torch.cat(kernels).contiguous(memory_format=torch.channels_last), padding=1)
    parts = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels)).unbind(3)
    rows = [
        torch.stack([part[:, i : i + height, j : j + width, j] for j in (0, 1)], dim=3)
        for i, part in enumerate(parts)
    ]
    return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What three weights of a dimension are to the two values below an even or an odd position."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """The same as a transposed convolution of 4 x 4: each value is added to the 16 around it."""
    padded = F.pad(weight.flip(2, 3), (1, 1, 1, 1))
    rows = padded[:, :, 1:] + padded[:, :, :-1]
    kernel = (rows[..., 1:] + rows[..., :-1]).transpose(0, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1)


#: By the word that names them in `bench.gpu`.
DOUBLED = {"phases": by_phases, "transposed": transposed}


def guided_diffusion(config: UNetConfig, *, path: Path, fp16: bool = False) -> Net:
    """The network of a checkout of openai/guided-diffusion.

    Raises:
        ValueError: there is no checkout at `path`, or its network has other weights than ours.
    """
    net = _guided_diffusion(path).UNetModel(
        **_options(config),
        num_classes=config.num_classes,
        use_fp16=fp16,
        num_heads_upsample=config.heads_up or -1,
    )
    check_same(net, config, name="guided-diffusion")
    if fp16:
        net.convert_to_fp16()
    return Net(net, lambda x, t, y: net(x, t, y))


def guided_diffusion_classifier(config: ClassifierConfig, *, path: Path) -> nn.Module:
    """The classifier of a checkout of openai/guided-diffusion, in fp16 on a GPU."""
    fp16 = torch.cuda.is_available()
    net: Any = _guided_diffusion(path).EncoderUNetModel(
        **_options(config), use_fp16=fp16, pool=config.pool
    )
    check_same(net, config, name="guided-diffusion")
    if fp16:
        net.convert_to_fp16()
    module: nn.Module = net
    return module


def _options(config: NetworkConfig) -> dict[str, Any]:
    """What guided-diffusion's two networks are both told."""
    out = config.out_channels if isinstance(config, UNetConfig) else config.num_classes
    return {
        "image_size": config.image_size,
        "in_channels": 3,
        "model_channels": config.channels,
        "out_channels": out,
        "num_res_blocks": config.blocks,
        "attention_resolutions": tuple(config.image_size // size for size in config.attention),
        "dropout": config.dropout,
        "channel_mult": config.channel_mult,
        "num_heads": config.heads or 1,
        "num_head_channels": config.head_channels or -1,
        "use_scale_shift_norm": config.conditioning == "adagn",
        "resblock_updown": config.resample == "biggan",
        "use_new_attention_order": config.qkv == "new",
    }


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
        ValueError: its network has other weights than ours.
    """
    model: Any = importlib.import_module("diffusers").UNet2DModel
    net = model.from_config(diffusers_format.options(config))
    named = partial(diffusers_format.to_diffusers, config=config)
    check_same(net, config, name="diffusers", named=named)
    return Net(net, lambda x, t, y: net(x, t, y).sample)


def check_same(
    net: nn.Module,
    config: NetworkConfig,
    *,
    name: str,
    named: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda weights: weights,
) -> None:
    """Raise ValueError unless another's network has our weights, as `named` names them."""
    with torch.device("meta"):
        own = named(build(config).state_dict())
    shapes = [{key: weight.shape for key, weight in w.items()} for w in (own, net.state_dict())]
    differing = sorted(key for key, _ in shapes[0].items() ^ shapes[1].items())
    if differing:
        raise ValueError(f"{name} has another network than ours: {', '.join(differing[:3])}, ...")


def others(path: Path | None) -> dict[str, Callable[[UNetConfig], Net]]:
    """What makes guided-diffusion's, where a checkout is given, and diffusers', where installed."""
    found: dict[str, Callable[[UNetConfig], Net]] = {}
    if path is not None:
        found["guided-diffusion"] = partial(guided_diffusion, path=path)
    if importlib.util.find_spec("diffusers"):
        found["diffusers"] = diffusers
    else:
        print("diffusers is left out: it is not installed (`pip install diffusers`)")
    return found


def inputs(config: UNetConfig, *, images: int, device: torch.device) -> tuple[Tensor, ...]:
    """Noised images (B, 3, H, W), timesteps (B,) and labels (B,)."""
    x = torch.randn(images, 3, config.image_size, config.image_size, device=device)
    t = torch.arange(images, device=device) * 7 % 1000
    return x, t, t % (config.num_classes or 1)
