"""Networks that turn images into features.

    --network FILE.pth       the Inception weights of FID (the ADM evaluator's network)
    --network RUN            a noisy classifier's run or checkpoint, at t = 0
    --network FILE.pt2       any network saved by `torch.export.save`
    --network dinov2:FILE.pt2   the same with DINOv2's resizing and scaling ahead of it (FD-DINOv2)

An exported network takes uint8 (B, 3, H, W), after `dinov2:` float32 (B, 3, 224, 224), and returns
features (B, D).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from data import files
from trainer import common, diffusers_format, weights
from trainer.adm.config import ClassifierConfig
from trainer.adm.objective import to_range
from trainer.engine import caches
from trainer.engine.compute import without_tf32
from trainer.evaluation.inception import SOURCE, WEIGHTS, Features, Inception
from trainer.networks import TrainedNetwork
from trainer.ranks.group import agreed, from_main

# The prefix of an exported network's path that says that it takes DINOv2's input.
DINO = "dinov2:"
# The beginning of the name of such a network in results.
_DINO_NAME = "dinov2 "
_DINO_SIDE = 224
# Mean and standard deviation of ImageNet's channels, in units of 0..1.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The first hex digits of the published Inception weights' sha256.
_PUBLISHED = WEIGHTS.rpartition("-")[2].removesuffix(".pth")


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network that computes features, and what identifies it in results."""

    name: str
    sha256: str
    net: nn.Module
    #: uint8 (B, 3, H, W) on the device -> features.
    compute: Callable[[Tensor], Features]
    #: Whether features are comparable to those in the ADM evaluator's reference files.
    is_inception: bool = False
    #: A remark that is printed and kept with its figures.
    warning: str | None = None

    def is_recorded(self, name: str, sha256: str) -> bool:
        """Whether a record's name and checksum are this network's, with the same input to it."""
        is_dino = self.name.startswith(_DINO_NAME)
        return sha256 == self.sha256 and name.startswith(_DINO_NAME) == is_dino


def open_network(text: str, *, device: torch.device) -> FeatureNetwork:
    """The network that `--network` names. All ranks must call it.

    Raises:
        Refused, Broken: there is none, it is of another kind, or another on some ranks.
    """
    path = Path(text.removeprefix(DINO))
    found = from_main(lambda: _run(text, path))
    if found is None:
        network = agreed(lambda: _file(text, path, device=device))
        common.check({"network (sha256)": network.sha256})
    else:
        network = _classifier(found, path, device=device)

    def compute(images: Tensor) -> Features:
        with without_tf32():  # figures would depend on the GPU, and on a run's training.tf32
            return network.compute(images)

    return replace(network, compute=compute)


def _run(text: str, path: Path) -> TrainedNetwork | None:
    """The classifier of a run directory; None where the path is a file."""
    if not path.exists():
        raise ValueError(
            f"network {text}: no such file or run. For the paper's figures, download {WEIGHTS} "
            f"(95 MB) from {SOURCE} and give its path"
        )
    if not path.is_dir():
        return None
    if diffusers_format.find(path) is None:  # which has no classifiers
        found = TrainedNetwork.find(path)
        if isinstance(found.config.model, ClassifierConfig):
            return found
    raise ValueError(f"network {path}: it is no classifier, whose features could be used")


def _file(text: str, path: Path, *, device: torch.device) -> FeatureNetwork:
    if path.suffix == ".pt2":
        return _exported(path, dino=text.startswith(DINO), device=device)
    return _inception(path, device=device)


def _inception(path: Path, *, device: torch.device) -> FeatureNetwork:
    checksum = files.sha256(path)
    with torch.device("meta"):
        net = Inception()
    loaded = weights.load(path)
    weights.check_fit(net.state_dict(), loaded, source=f"{path} (as Inception's weights)")
    net.load_state_dict(loaded, assign=True)
    net.to(device)
    foreign = not checksum.startswith(_PUBLISHED)
    return FeatureNetwork(
        name="inception-2015-12-05",
        sha256=checksum,
        net=net,
        compute=net,
        is_inception=True,
        warning=f"{path} is not the published {WEIGHTS}" if foreign else None,
    )


def _classifier(found: TrainedNetwork, path: Path, *, device: torch.device) -> FeatureNetwork:
    """A noisy classifier on clean images: the mean of its last map, and its class scores."""
    net = found.net(device=device, precision="fp32")
    side = found.config.model.image_size
    seen: list[Tensor] = []
    head = net.get_submodule("out")
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))

    def compute(images: Tensor) -> Features:
        if images.shape[-1] != side:
            raise ValueError(
                f"network {path}: it is a classifier of {side} x {side} images, and these are "
                f"{images.shape[-2]} x {images.shape[-1]}: give one of their size"
            )
        logits = net(to_range(images), torch.zeros(len(images), device=images.device))
        h = seen.pop()
        return Features(h.flatten(2).mean(dim=2) if h.dim() > 2 else h, logits=logits)

    name = f"classifier {path}"
    return FeatureNetwork(name=name, sha256=found.sha256, net=net, compute=compute)


def _exported(path: Path, *, dino: bool, device: torch.device) -> FeatureNetwork:
    caches.check_made()
    try:
        # A program also names the device of each tensor that it makes: `.to` would leave these.
        net: nn.Module = move_to_device_pass(torch.export.load(path), device).module()
    except Exception as error:  # zip, pickle and schema errors of many types
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"network {path}: cannot be loaded: {said[0]}") from None

    def compute(images: Tensor) -> Features:
        try:
            found = net(_for_dino(images) if dino else images)
        except AssertionError as error:  # the program's own guards
            size = tuple(images.shape[1:])
            raise ValueError(f"network {path}: does not take images of {size}: {error}") from None
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            raise ValueError(f"network {path}: it does not return features (images, columns)")
        return Features(found.float())

    name = f"{_DINO_NAME if dino else ''}{path.name}"
    return FeatureNetwork(name=name, sha256=files.sha256(path), net=net, compute=compute)


def _for_dino(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 224, 224), bicubic, in ImageNet's mean and deviation."""
    size = (_DINO_SIDE, _DINO_SIDE)
    x = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True)
    mean, deviation = (x.new_tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
    return (x.clamp(0, 1) - mean) / deviation
