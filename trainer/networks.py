"""The networks of a sampling request: which weights the command line names, found and filled."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trainer import averages, weights
from trainer import checkpoint as checkpoints
from trainer import config as configs
from trainer.adm.config import ClassifierConfig
from trainer.adm.unet import build
from trainer.config import Config
from trainer.draw import DTYPES


@dataclass(frozen=True)
class TrainedNetwork:
    """Which weights of which network: picked once, by the main rank, since a run may go on."""

    config: Config
    file: Path
    sha256: str
    #: As messages name it.
    name: str

    @classmethod
    def find(cls, path: Path, *, preset: str | None, decay: float | None) -> "TrainedNetwork":
        """In a run directory (its newest valid checkpoint), a checkpoint, or a file and its preset.

        Raises:
            ValueError: there is nothing of that kind at `path`.
        """
        name = str(path) if preset is None else f"{path} (preset {preset})"
        if path.is_dir():
            found = _newest(path)
            run = found.path.parent.parent
            config = configs.load(run / "config.toml" if preset is None else preset)
            average = averages.exponential(config.training.ema[0] if decay is None else decay)
            file = found.file(average)
            if file.name not in found.files:
                kinds = ", ".join(sorted(n.removesuffix(".safetensors") for n in found.files))
                raise ValueError(f"{found.path} has no {average}; it has: {kinds}")
            return cls(config, file, found.files[file.name]["sha256"], name)
        if preset is None:
            raise ValueError(f"{path} is no run directory; for a weights file, name its preset too")
        if not path.is_file():
            raise ValueError(f"no such weights file: {path}")
        return cls(configs.load(preset), path, checkpoints.sha256(path), name)

    def net(self, *, device: torch.device, precision: str | None) -> nn.Module:
        """The network, filled, on `device`; by default as it was trained, but on a CPU in fp32.

        Raises:
            ValueError: the file does not hold the weights of this network.
        """
        net = build(self.config.model)
        weights.fill(net, weights.load(self.file), source=self.file)
        own = "fp32" if device.type == "cpu" else self.config.training.precision
        return net.to(device, DTYPES[precision or own]).eval().requires_grad_(False)


def _newest(path: Path) -> checkpoints.Checkpoint:
    """A checkpoint, or a run's newest valid one."""
    is_checkpoint = (path / checkpoints.STATE).is_file()
    for one in [path] if is_checkpoint else checkpoints.committed(path / "checkpoints"):
        try:
            found = checkpoints.read(one)
            if not (faults := found.faults()):
                return found
        except ValueError as error:
            faults = [str(error)]
        print(f"skipped {one}: {faults[0]}", file=sys.stderr)
    raise ValueError(f"{path} has no valid checkpoint")


# What a classifier must share with the network that it guides, where the network has it: the
# images, the classes, and what decides q(x_t | x_0) at a timestep.
_SHARED = ("model.image_size", "model.num_classes", "diffusion.steps", "diffusion.schedule")


def check_guide(classifier: TrainedNetwork, *, network: TrainedNetwork) -> None:
    """Return if `classifier` can guide `network`.

    Raises:
        ValueError: it is no classifier, or one of other images, classes or noise.
    """
    if not isinstance(classifier.config.model, ClassifierConfig):
        raise ValueError(f"{classifier.file} is no classifier: --classifier needs one")
    own, wanted = configs.flatten(classifier.config), configs.flatten(network.config)
    differing = [
        f"{setting} = {json.dumps(own[setting])} instead of {json.dumps(wanted[setting])}"
        for setting in _SHARED
        if setting in wanted and own[setting] != wanted[setting]
    ]
    if differing:
        raise ValueError(
            f"--classifier {classifier.name} cannot guide the network {network.name}: it was "
            f"trained with {', '.join(differing)}; give a classifier that was trained with the "
            "network's values, or correct the preset of a weights file"
        )


@dataclass(frozen=True)
class SampleInputs:
    """The networks of a request, and the checksum of the images that an upsampler enlarges."""

    denoiser: TrainedNetwork
    classifier: TrainedNetwork | None
    low_res: str | None

    @classmethod
    def find(cls, arguments: argparse.Namespace) -> "SampleInputs":
        """What the command line names.

        Raises:
            ValueError: something of it is not there.
        """
        denoiser = TrainedNetwork.find(
            arguments.source, preset=arguments.preset, decay=arguments.ema
        )
        classifier = None
        if arguments.classifier is not None:
            classifier = TrainedNetwork.find(
                arguments.classifier, preset=arguments.classifier_preset, decay=None
            )
        low_res: Path | None = arguments.low_res
        if low_res is not None and not low_res.is_file():
            raise ValueError(f"no such file of samples: --low-res {low_res}")
        return cls(denoiser, classifier, None if low_res is None else checkpoints.sha256(low_res))
