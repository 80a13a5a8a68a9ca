"""Evaluation in training: samples of the first EMA, and their figures against a reference.

All ranks draw samples and compute their features; the main rank computes the figures. They are
those of `python -m trainer.sample` and `trainer.evaluate` with the same settings, on any number of
ranks. No state of the training is changed.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.dataset import Shards
from trainer.config.experiment import Config
from trainer.engine import averages
from trainer.engine.zero import Engine
from trainer.evaluation.drawn import features_of_samples, sampler_of
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.extraction import Extracted, joined
from trainer.evaluation.features import open_network
from trainer.evaluation.reference import MANIFOLD, Reference
from trainer.evaluation.results import Figure, Results, compare, short
from trainer.ranks.faults import Refused
from trainer.ranks.group import agreed, from_main, gather, until_stopped
from trainer.ranks.world import World
from trainer.validation import ValidationSet

#: The group of the figures in metrics.jsonl and on the boards.
GROUP = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluates a run at its intervals. All ranks make each call together."""

    config: Config
    evaluator: Evaluator
    #: The images that an upsampler enlarges.
    enlarged: ValidationSet | None
    #: Set by `with_reference`, on the main rank.
    reference: Reference | None = None

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        validation: ValidationSet | None,
        world: World,
        device: torch.device,
    ) -> "Evaluation | None":
        """The evaluation that a config asks for, or None; what it needs is checked.

        Raises:
            Refused, Broken: something is missing, damaged, of another size, or too small.
        """
        asked = config.evaluation
        if asked.reference is None or asked.network is None:
            return None
        try:
            evaluator = Evaluator(
                network=open_network(asked.network, device=device),
                world=world,
                device=device,
                batch_size=config.training.micro_batch,
            )
            enlarged = _enlarged(config, validation)
            side, reference = config.model.image_size, Path(asked.reference)
            evaluator.check_samples(asked.images, side=side, reference=reference)
        except Refused as error:
            raise Refused(f"evaluation: {error}") from None
        evaluator.network.net.to("cpu")
        return cls(config=config, evaluator=evaluator, enlarged=enlarged)

    @property
    def _count(self) -> int:
        return self.config.evaluation.images

    def with_reference(
        self, *, mark: Callable[[str], None], say: Callable[[str], None]
    ) -> "Evaluation":
        """This evaluation with the features of its reference, which are computed here.

        Raises:
            Refused: an image of the reference is damaged, or there are too few.
        """
        side, net = self.config.model.image_size, self.evaluator.network.net
        path = Path(str(self.config.evaluation.reference))
        evaluator = replace(
            self.evaluator, say=say, on_images=lambda _: mark("features of the reference")
        )
        net.to(evaluator.device)
        found = evaluator.reference(path, size=(side, side))
        net.to("cpu")

        if found is not None and path.is_dir() and (found.count or 0) > MANIFOLD:
            say(
                "every start computes these features: to do it once, run `python -m trainer."
                f"evaluate reference {shlex.quote(str(path))} --out FILE.npz` and name "
                "that file"
            )
        return replace(self, evaluator=evaluator, reference=found)

    def measure(
        self,
        engine: Engine,
        *,
        mark: Callable[[str], None],
        stopped: Callable[[], bool],
        about: Mapping[str, str | int],
    ) -> Results | None:
        """The figures of samples from the first EMA; None if a rank was `stopped` meanwhile.

        The results record `about`: the run, and its clock.

        Raises:
            Refused: an image that an upsampler enlarges is damaged.
        """
        network, device = self.evaluator.network, self.evaluator.device
        drawn = None
        network.net.to(device)
        kind = averages.exponential(self.config.training.ema[0])
        with engine.weights(kind) as tensors, torch.no_grad(), until_stopped(stopped) as check:
            drawn = features_of_samples(
                tensors,
                config=self.config,
                evaluator=self.evaluator,
                enlarged=self.enlarged,
                mark=mark,
                check=check,
            )
        network.net.to("cpu")
        if drawn is None:
            return None
        share, black = drawn
        mark("figures of samples")
        black = sum(gather(black))
        found = joined(share, count=self._count, device=device)
        return from_main(lambda: self._compare(found, black=black, about=about))

    def _compare(
        self, found: Extracted | None, *, black: int, about: Mapping[str, str | int]
    ) -> Results:
        """The figures, on the main rank; none, but a warning, where features are not finite."""
        assert found is not None
        assert self.reference is not None
        asked, network, reference = self.config.evaluation, self.evaluator.network, self.reference
        told = {
            "samples": {**about, "steps": asked.steps, "labels": asked.labels, "cfg": asked.cfg},
            "reference": {"path": reference.name, "checksum": reference.checksum},
            "network": {"name": network.name, "sha256": network.sha256},
            "torch": torch.__version__,
        }
        warnings = [network.warning] if network.warning else []
        counted = {f"not_finite_{short(self._count)}": Figure(float(black))}
        if black:
            warnings.append(f"{black} of {self._count:,} samples are not finite, and were black")
        if not found.features.isfinite().all():
            warnings.append("the network's features of the samples are not finite: no figures")
            return Results(figures=counted, warnings=warnings, about=told)
        try:
            results = compare(found, reference, labels=None, about=told, warnings=warnings)
        except torch.linalg.LinAlgError as error:  # a run does not end for it
            warnings.append(f"no figures: {error}")
            return Results(figures=counted, warnings=warnings, about=told)
        return replace(results, figures={**results.figures, **counted})

    def cost(self) -> str:
        """A line for the log: the share of the training's compute that evaluation takes."""
        every, asked = self.config.intervals.evaluate, self.config.evaluation
        assert every is not None
        passes = (
            self._count * sampler_of(self.config).diffusion.steps * (1 if asked.cfg is None else 2)
        )
        # An image of training costs three forward passes.
        share = passes / (3 * every)
        return (
            f"evaluation: {self._count:,} samples of {asked.steps} steps every {every:,}, about "
            f"{share:.1%} of the training's compute; {asked.reference} in the features of "
            f"{self.evaluator.network.name}"
        )


def _enlarged(config: Config, validation: ValidationSet | None) -> ValidationSet | None:
    """For an upsampler, as many images of data.validation as it is to enlarge; else None."""
    if config.unet.small_size is None or validation is None:
        return None
    shards, images = validation.stream.shards, config.evaluation.images
    assert isinstance(shards, Shards)
    return agreed(
        lambda: ValidationSet.open(shards, config, images=images, named="evaluation.images")
    )


def describe(found: Results | None, *, count: int, seconds: float) -> list[str]:
    """Lines for the log."""
    if found is None:
        return ["the evaluation was interrupted; a resumed run begins with it"]
    figures = ", ".join(f"{name} {figure}" for name, figure in found.figures.items())
    lines = [f"evaluation of {count:,} samples: {figures}; {seconds:.1f} s"]
    return [*lines, *(f"evaluation: {warning}" for warning in found.warnings)]
