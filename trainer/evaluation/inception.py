"""The Inception network of FID (the graph of 2015-12-05), as the ADM evaluator uses it.

State-dict keys are those of the published weights file (`WEIGHTS`). Every convolution has no bias
and is followed by batch norm in evaluation mode and ReLU.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The weights file, and where it is published.
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"

#: Channels, height and width of sFID's features: the first channels of Mixed_6d.branch1x1.
SPATIAL = (7, 17, 17)
# Side of the input in pixels, and number of classes.
_SIDE, _CLASSES = 299, 1008


class Features(NamedTuple):
    """A network's features of B images, from which FID, sFID and IS follow, in this order.

    The latter two are None where a network has none.
    """

    #: (B, D). Inception's are the means of its last feature map, (B, 2048).
    pool: Tensor
    #: Inception: `SPATIAL` in the order height, width, channel, as in the ADM evaluator, (B, 2023).
    spatial: Tensor | None = None
    #: Class scores (B, K). Inception: without a bias, (B, 1008).
    logits: Tensor | None = None


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Branch(NamedTuple):
    """Units by name, each (outputs, kernel), one after another; the last ones may be parallel."""

    units: dict[str, tuple[int, tuple[int, int]]]
    #: How many of the last units are parallel: they read the same input, and all are outputs.
    abreast: int = 1
    #: Whether the last unit has stride 2.
    halves: bool = False


class Mixed(nn.Module):
    """Branches on the same input, and a pooling of it, whose outputs are concatenated."""

    def __init__(
        self, inputs: int, branches: list[Branch], *, pooled: int | None, maximum: bool = False
    ) -> None:
        super().__init__()
        self._chains: list[tuple[list[str], list[str]]] = []
        self._maximum = maximum
        for units, abreast, halves in branches:
            width, names = inputs, list(units)
            chain, last = names[:-abreast], names[-abreast:]
            for name, (outputs, kernel) in units.items():
                stride = 2 if halves and name in last else 1
                self.add_module(name, Unit(width, outputs, kernel=kernel, stride=stride))
                width = outputs if name in chain else width
            self._chains.append((chain, last))
        if pooled is not None:
            self.branch_pool = Unit(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        outputs = []
        for chain, last in self._chains:
            h = x
            for name in chain:
                h = self.get_submodule(name)(h)
            outputs += [self.get_submodule(name)(h) for name in last]
        return torch.cat([*outputs, self._pool(x)], dim=1)

    def _pool(self, x: Tensor) -> Tensor:
        if not hasattr(self, "branch_pool"):
            return F.max_pool2d(x, 3, stride=2)
        if self._maximum:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        out: Tensor = self.branch_pool(pooled)
        return out


_ONE, _THREE, _FIVE = (1, 1), (3, 3), (5, 5)
_WIDE, _HIGH = (1, 7), (7, 1)
_DOUBLE = {
    "branch3x3dbl_1": (64, _ONE),
    "branch3x3dbl_2": (96, _THREE),
    "branch3x3dbl_3": (96, _THREE),
}


def _mixed_5(inputs: int, *, pooled: int) -> Mixed:
    branches = [
        Branch({"branch1x1": (64, _ONE)}),
        Branch({"branch5x5_1": (48, _ONE), "branch5x5_2": (64, _FIVE)}),
        Branch(_DOUBLE),
    ]
    return Mixed(inputs, branches, pooled=pooled)


def _mixed_6a() -> Mixed:
    branches = [Branch({"branch3x3": (384, _THREE)}, halves=True), Branch(_DOUBLE, halves=True)]
    return Mixed(288, branches, pooled=None)


def _mixed_6(width: int) -> Mixed:
    double = [(width, _ONE), (width, _HIGH), (width, _WIDE), (width, _HIGH), (192, _WIDE)]
    branches = [
        Branch({"branch1x1": (192, _ONE)}),
        Branch(
            {
                "branch7x7_1": (width, _ONE),
                "branch7x7_2": (width, _WIDE),
                "branch7x7_3": (192, _HIGH),
            }
        ),
        Branch({f"branch7x7dbl_{i}": unit for i, unit in enumerate(double, start=1)}),
    ]
    return Mixed(768, branches, pooled=192)


def _mixed_7a() -> Mixed:
    long = {
        "branch7x7x3_1": (192, _ONE),
        "branch7x7x3_2": (192, _WIDE),
        "branch7x7x3_3": (192, _HIGH),
        "branch7x7x3_4": (192, _THREE),
    }
    short = {"branch3x3_1": (192, _ONE), "branch3x3_2": (320, _THREE)}
    return Mixed(768, [Branch(short, halves=True), Branch(long, halves=True)], pooled=None)


def _mixed_7(inputs: int, *, maximum: bool) -> Mixed:
    branches = [
        Branch({"branch1x1": (320, _ONE)}),
        Branch(
            {
                "branch3x3_1": (384, _ONE),
                "branch3x3_2a": (384, (1, 3)),
                "branch3x3_2b": (384, (3, 1)),
            },
            abreast=2,
        ),
        Branch(
            {
                "branch3x3dbl_1": (448, _ONE),
                "branch3x3dbl_2": (384, _THREE),
                "branch3x3dbl_3a": (384, (1, 3)),
                "branch3x3dbl_3b": (384, (3, 1)),
            },
            abreast=2,
        ),
    ]
    return Mixed(inputs, branches, pooled=192, maximum=maximum)


class Inception(nn.Module):
    """uint8 images of any size to features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, kernel=_THREE, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, kernel=_THREE, padded=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, kernel=_THREE)
        self.Conv2d_3b_1x1 = Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, kernel=_THREE, padded=False)
        self.Mixed_5b = _mixed_5(192, pooled=32)
        self.Mixed_5c = _mixed_5(256, pooled=64)
        self.Mixed_5d = _mixed_5(288, pooled=64)
        self.Mixed_6a = _mixed_6a()
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        self.Mixed_7a = _mixed_7a()
        self.Mixed_7b = _mixed_7(1280, maximum=False)
        self.Mixed_7c = _mixed_7(2048, maximum=True)
        self.fc = nn.Linear(2048, _CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Pixels 0..255 (B, 3, H, W) -> features."""
        x = (resize(images.to(self.fc.weight.dtype)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)
        spatial = spatial[:, : SPATIAL[0]].movedim(1, -1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return Features(pool, spatial, F.linear(pool, self.fc.weight))


def resize(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, 299, 299): TensorFlow 1's bilinear resize.

    Output i is at i * size / 299 of the input, without half-pixel centres and, when it shrinks,
    without smoothing.
    """
    rows, columns = (_interpolation(size, like=images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(size: int, *, like: Tensor) -> Tensor:
    """The matrix (299, size) of a bilinear resize along one side."""
    at = torch.arange(_SIDE, dtype=torch.float64, device=like.device) * (size / _SIDE)
    left = at.long().clamp(max=size - 1)
    right = (left + 1).clamp(max=size - 1)
    matrix = torch.zeros(_SIDE, size, dtype=torch.float64, device=like.device)
    row = torch.arange(_SIDE, device=like.device)
    matrix.index_put_((row, left), 1 - (at - left), accumulate=True)
    matrix.index_put_((row, right), at - left, accumulate=True)
    return matrix.to(like.dtype)
