"""The networks that the command line of `trainer.sample` names, and whether they fit each other."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass

from trainer import classes
from trainer.networks import TrainedNetwork, names_of
from trainer.sampling.fit import check_fit


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
        check_fit(arguments, source, classifier=found.classifier, upsampler=found.upsampler)
        found._check_names()
        if found.upsampler is not None:
            # Checked now, since it is needed only when all images are drawn.
            found.upsampler.check_weights()
        return found

    def _check_names(self) -> None:
        """Raise ValueError where the networks number classes differently."""
        if self.classifier is not None:
            check_names(self.classifier, network=self.denoiser, option="--classifier")
        if self.upsampler is not None:
            check_names(self.upsampler, network=self.labelled, option="--upsampler")


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
