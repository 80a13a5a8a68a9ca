"""The networks that the command line of `trainer.sample` names, and whether they fit each other."""

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass

from trainer import classes
from trainer.adm.config import ClassifierConfig
from trainer.config import experiment as configs
from trainer.networks import TrainedNetwork, names_of

# Settings that a classifier must share with the network that it guides, if the network has them:
# the images, the classes, and what determines q(x_t | x_0) at a timestep.
_SHARED = ("model.image_size", "model.num_classes", "diffusion.steps", "diffusion.schedule")


@dataclass(frozen=True)
class SampleInputs:
    """The networks that the command line of `trainer.sample` names."""

    denoiser: TrainedNetwork
    classifier: TrainedNetwork | None
    upsampler: TrainedNetwork | None

    @property
    def labelled(self) -> TrainedNetwork:
        """The network that decides the images' classes: the denoiser's or else the classifier's."""
        knows = self.denoiser.config.model.num_classes is not None
        return self.denoiser if knows or self.classifier is None else self.classifier

    @property
    def classes(self) -> int | None:
        """How many classes there are; None if no network has classes."""
        return self.labelled.config.model.num_classes

    @classmethod
    def find(cls, arguments: argparse.Namespace, *, begun: Collection[str] = ()) -> "SampleInputs":
        """The networks that the command line names; `begun` as in `TrainedNetwork.find`.

        Raises:
            ValueError: one of them is not there, or they do not fit each other.
        """
        given = vars(arguments)

        def other(name: str) -> TrainedNetwork | None:
            path, preset = given[name], given[f"{name}_preset"]
            if path is None:
                return None
            option = f"--{name}-preset"
            return TrainedNetwork.find(path, preset=preset, option=option, begun=begun)

        source = TrainedNetwork.find(
            arguments.source, preset=arguments.preset, decay=arguments.ema, begun=begun
        )
        found = cls(source, other("classifier"), other("upsampler"))
        found._check()
        return found

    def _check(self) -> None:
        """Raise ValueError unless the networks fit each other."""
        source = self.denoiser
        if isinstance(source.config.model, ClassifierConfig):
            raise ValueError(f"{source.file} is a classifier; give it as --classifier")
        if self.classifier is not None:
            check_guide(self.classifier, network=source)
            check_names(self.classifier, network=source, option="--classifier")
        if self.upsampler is not None:
            check_upsampler(self.upsampler, base=source, classes=self.classes)
            check_names(self.upsampler, network=self.labelled, option="--upsampler")
            # Checked now, since it is needed only when all images are drawn.
            self.upsampler.check_weights()


def check_guide(classifier: TrainedNetwork, *, network: TrainedNetwork) -> None:
    """Raise ValueError unless `classifier` can guide `network`."""
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


def check_names(other: TrainedNetwork, *, network: TrainedNetwork, option: str) -> None:
    """Raise ValueError if the networks number classes differently, as far as names are known."""
    own, theirs = trained_names(network), trained_names(other)
    if differs := classes.difference(own, theirs, named=network.name):
        raise ValueError(
            f"{option} {other.name}: {differs}: train it on shards that were packed with "
            f"--classes-of; if its own, {other.config.data.shards}, were packed anew since, give "
            "the checkpoint's file and a preset"
        )


def trained_names(network: TrainedNetwork) -> tuple[str, ...] | None:
    """The names of the classes that it was trained on, if its shards are here; else None."""
    return names_of(network.config) if network.has_own_config else None


def check_upsampler(
    upsampler: TrainedNetwork, *, base: TrainedNetwork, classes: int | None
) -> None:
    """Raise ValueError unless `upsampler` can enlarge what `base` draws in `classes` classes."""
    model, size = upsampler.config.model, base.config.model.image_size
    if isinstance(model, ClassifierConfig) or model.small_size is None:
        raise ValueError(f"{upsampler.file} is no upsampler: --upsampler needs one")
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
