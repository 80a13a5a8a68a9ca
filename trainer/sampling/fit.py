"""Whether the networks and options of `python -m trainer.sample` fit each other, by configs alone.

No torch here: a login node checks it before a job is queued.
"""

import argparse
import json
from typing import Protocol

from data.config import naming
from trainer.adm.config import ClassifierConfig
from trainer.adm.respacing import kept_timesteps
from trainer.config import experiment as configs
from trainer.config.experiment import Config

# Settings that a classifier must share with the network that it guides, if the network has them:
# the images, the classes, and what determines q(x_t | x_0) at a timestep.
_SHARED = ("model.image_size", "model.num_classes", "diffusion.steps", "diffusion.schedule")


class Network(Protocol):
    """A network as far as it is needed here."""

    @property
    def config(self) -> Config:
        """How it was built and trained."""

    @property
    def name(self) -> str:
        """Its name in messages."""


def check_fit(
    arguments: argparse.Namespace,
    source: Network,
    *,
    classifier: Network | None,
    upsampler: Network | None,
) -> None:
    """Raise ValueError unless the networks fit each other and the options."""
    _check_source(source, arguments)
    classes = source.config.model.num_classes
    if classifier is not None:
        check_guides(classifier, network=source)
        classes = classifier.config.model.num_classes
    if upsampler is not None:
        check_enlarges(upsampler, base=source, classes=classes)
        with naming("--upsampler-steps"):
            steps = arguments.upsampler_steps or arguments.steps
            kept_timesteps(upsampler.config.diffusion.steps, steps)


def _check_source(source: Network, arguments: argparse.Namespace) -> None:
    if isinstance(source.config.model, ClassifierConfig):
        raise ValueError(f"{source.name} is a classifier; give it as --classifier")
    small = source.config.model.small_size
    if (arguments.low_res is None) != (small is None):
        needs = f"needs --low-res with {small} px images" if small else ""
        raise ValueError(f"{source.name} {needs or 'is no upsampler: leave out --low-res'}")
    if arguments.cfg and not source.config.training.label_dropout:
        raise ValueError(f"--cfg: {source.name} was trained without training.label_dropout")
    with naming("--steps"):
        kept_timesteps(source.config.diffusion.steps, arguments.steps)


def check_guides(classifier: Network, *, network: Network) -> None:
    """Raise ValueError unless `classifier` can guide `network`."""
    if not isinstance(classifier.config.model, ClassifierConfig):
        raise ValueError(f"{classifier.name} is no classifier: --classifier needs one")
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


def check_enlarges(upsampler: Network, *, base: Network, classes: int | None) -> None:
    """Raise ValueError unless `upsampler` can enlarge what `base` draws in `classes` classes."""
    model, size = upsampler.config.model, base.config.model.image_size
    if isinstance(model, ClassifierConfig) or model.small_size is None:
        raise ValueError(f"{upsampler.name} is no upsampler: --upsampler needs one")
    if model.small_size != size:
        raise ValueError(
            f"--upsampler {upsampler.name} enlarges {model.small_size} px, and {base.name} draws "
            f"{size} px"
        )
    if model.num_classes not in (None, classes):
        raise ValueError(
            f"--upsampler {upsampler.name} has {model.num_classes} classes, and {base.name} is "
            f"drawn in {classes or 'none'}"
        )
