"""A trained network over images that it has not learned from: likelihood, or accuracy.

  python -m trainer.evaluate nll RUN --data SHARDS          bits per dimension
  python -m trainer.evaluate classifier RUN --data SHARDS   accuracy by quarter of t

Noise and timesteps are fixed for each image. On several ranks, as under torchrun, each computes a
share, and the result is the same.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.config import naming
from data.dataset import class_names, open_shards, unlisted
from data.exits import CommandParser, place_text
from data.progress import Progress
from data.stream import Batch
from trainer import classes, common
from trainer.adm import keyed
from trainer.adm.config import ClassifierConfig, check
from trainer.adm.diffusion import Diffusion, bits_per_dimension
from trainer.adm.objective import Classify, low_resolution, to_range
from trainer.adm.respacing import kept_timesteps
from trainer.engine.compute import DTYPES
from trainer.evaluation import outputs
from trainer.networks import TrainedNetwork
from trainer.options import add_local_rank
from trainer.ranks.context import RankContext
from trainer.ranks.group import agreed, from_main
from trainer.ranks.world import World
from trainer.validation import SEED, Terms, ValidationSet, means
from trainer.watch.metrics import QUARTERS

# The commands, and the entry by which the results of each are recognised.
_OF = {"nll": "bits_per_dimension", "classifier": "loss"}
COMMANDS = tuple(_OF)


@dataclass(frozen=True)
class HeldOut:
    """A network and the images that it is measured on. All ranks make each call together."""

    network: TrainedNetwork
    images: ValidationSet
    net: nn.Module
    batch_size: int
    context: RankContext

    @classmethod
    def open(cls, arguments: argparse.Namespace, *, context: RankContext) -> "HeldOut":
        """The network and images that the command line names.

        Raises:
            Refused: one of them is not there, or they do not fit each other.
        """
        network = from_main(lambda: _find(arguments))
        images = agreed(lambda: _open_images(arguments, network, world=context.world))
        common.check({"images of --data": images.stream.shards.fingerprint})
        net = network.net(device=context.device, precision=arguments.precision)
        return cls(network, images, net, arguments.batch, context)

    def table(self, terms: Terms, *, progress: Callable[[int], None]) -> dict[str, Tensor]:
        """As `ValidationSet.table`, uninterrupted."""
        with torch.no_grad():
            table = self.images.table(
                terms,
                batch_size=self.batch_size,
                world=self.context.world,
                device=self.context.device,
                stopped=lambda: False,
                on_images=progress,
            )
        assert table is not None
        return table


def likelihood(held_out: HeldOut, *, steps: str | None) -> dict[str, Any]:
    """Bits per dimension, and the terms "vb" and "mse" by timestep. All ranks must call it.

    `steps` respaces the diffusion, as for sampling; None visits all timesteps. An upsampler is
    given the images' area means.
    """
    config, context = held_out.network.config, held_out.context
    model = config.unet
    diffusion = Diffusion(config.diffusion, respacing=steps)
    batches = -(-held_out.images.images // (held_out.batch_size * context.world.size))
    shown, clock = context.world.is_main, context.watchdog.clock
    total = batches * diffusion.steps
    progress = Progress(total=total, unit="passes", shown=shown, say=_say, clock=clock)
    sums = torch.zeros(2, diffusion.steps, dtype=torch.float64, device=context.device)

    def terms(batch: Batch) -> dict[str, Tensor]:
        x0 = to_range(batch.images)
        labels = None if model.num_classes is None else batch.labels
        low_res = None if model.small_size is None else low_resolution(x0, model.small_size)

        def net(x_t: Tensor, t: Tensor) -> Tensor:
            progress.advance()
            out: Tensor = held_out.net(x_t, t, labels, low_res)
            return out.float()

        def noise(step: int) -> Tensor:
            stream, shape = keyed.SAMPLE_STEP + step, tuple(x0.shape[1:])
            return keyed.normal(batch.indices, seed=SEED, stream=stream, shape=shape)

        found = bits_per_dimension(diffusion, net, x0, noise=noise)
        sums.add_(torch.stack((found["vb"].double().sum(0), found["mse"].double().sum(0))))
        return {name: found[name] for name in ("total", "prior")}

    table = held_out.table(terms, progress=lambda _: None)
    dist.all_reduce(sums)
    vb, mse = (sums / held_out.images.images).tolist()
    deviation = float(table["total"].std()) if held_out.images.images > 1 else 0.0
    return {
        "bits_per_dimension": float(table["total"].mean()),
        "standard_error": deviation / held_out.images.images**0.5,
        "prior": float(table["prior"].mean()),
        "timesteps": diffusion.timestep_map.tolist(),
        "vb": vb,
        "mse": mse,
    }


def accuracy(held_out: HeldOut) -> dict[str, Any]:
    """The cross-entropy and accuracies of a classifier, overall and by quarter of t."""
    config, context = held_out.network.config, held_out.context
    objective = Classify(config.diffusion, seed=SEED)
    shown, clock = context.world.is_main, context.watchdog.clock
    progress = Progress(total=held_out.images.images, shown=shown, say=_say, clock=clock)
    table = held_out.table(
        lambda batch: objective(held_out.net, batch.images, batch.labels, batch.indices),
        progress=progress.advance,
    )
    return means(table, timesteps=config.diffusion.steps)


def measure(arguments: argparse.Namespace, *, context: RankContext) -> int:
    """Measure, print and write what the command line asks for; returns the exit status."""
    agreed(lambda: _check_options(arguments))
    held_out = HeldOut.open(arguments, context=context)
    facts = {
        "network": str(held_out.network.file),
        "sha256": held_out.network.sha256,
        "data": str(arguments.data),
        "fingerprint": held_out.images.stream.shards.fingerprint,
        "images": held_out.images.images,
    }
    is_nll = arguments.command == "nll"
    facts |= {"steps": arguments.steps} if is_nll else {}
    if arguments.out is not None:
        same = {name: facts[name] for name in facts if name not in ("network", "data")}
        agreed(lambda: outputs.check_same(arguments.out, outputs.stored_json(arguments.out), same))
    found = likelihood(held_out, steps=arguments.steps) if is_nll else accuracy(held_out)
    if context.world.is_main:
        print("\n".join(_lines(found, images=held_out.images.images)))
    if arguments.out is not None:
        text = json.dumps({**facts, **found}, indent=1) + "\n"
        from_main(lambda: outputs.write(arguments.out, text))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines(found: dict[str, Any], *, images: int) -> list[str]:
    """The result as it is printed."""
    if "bits_per_dimension" in found:
        bits, error = found["bits_per_dimension"], found["standard_error"]
        return [
            f"{bits:.4f} bits per dimension (+- {error:.4f}) over {images:,} images, of which "
            f"{found['prior']:.5f} are the prior's"
        ]
    heads = ["all", *(f"q{q}" for q in range(QUARTERS))]
    lines = [f"{images:,} images; q0 is the quarter of t with the least noise"]
    lines.append("            " + "".join(f"{head:>9}" for head in heads))
    for name, words in (("acc1", "accuracy@1"), ("acc5", "accuracy@5"), ("loss", "loss")):
        values = [found.get(name if head == "all" else f"{name}/{head}") for head in heads]
        lines.append(
            f"{words:<12}" + "".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in values)
        )
    return lines


def _check_options(arguments: argparse.Namespace) -> None:
    check(arguments.batch >= 1, "--batch", arguments.batch, "at least 1")
    images, out = arguments.images, arguments.out
    check(images is None or images >= 1, "--images", images, "at least 1")
    if out is not None:
        earlier = outputs.stored_json(out)
        if earlier is not None and not {"fingerprint", _OF[arguments.command]} <= earlier.keys():
            earlier = None
        kind = f"result of `{arguments.command}`"
        outputs.check_place(out, suffix=".json", kind=kind, earlier=earlier)


def _find(arguments: argparse.Namespace) -> TrainedNetwork:
    command = arguments.command
    network = TrainedNetwork.find(arguments.run, preset=arguments.preset, decay=arguments.ema)
    is_net = not isinstance(network.config.model, ClassifierConfig)
    if is_net is not (command == "nll"):
        other, kind = ("classifier", "classifier") if not is_net else ("nll", "diffusion model")
        raise ValueError(f"{network.name} is a {kind}: use `{other}` instead of `{command}`")
    if is_net and arguments.steps is not None:
        with naming("--steps"):
            kept_timesteps(network.config.diffusion.steps, arguments.steps)
    return network


def _open_images(
    arguments: argparse.Namespace, network: TrainedNetwork, *, world: World
) -> ValidationSet:
    """The images of `--data`; ValueError if their classes are not those of the training set.

    Names of classes are compared if the training set is here.
    """
    config = network.config
    check_files = world.local_rank == 0
    shards = open_shards(arguments.data, fetch=config.data, check_files=check_files)
    if world.is_main and (said := unlisted(shards)):
        print(said)
    try:
        own = class_names(config.data.shards)
    except ValueError:
        own = shards.classes
        if world.is_main and config.model.num_classes is not None:
            print(f"{config.data.shards} is not here: names of classes are not compared")
    count = config.model.num_classes
    fits = count is None or (shards.labelled and len(shards.classes) <= count)
    check(fits, "--data", arguments.data, f"labelled, in at most {count} classes as the network")
    classes.check_held_out(config, shards, training=own, named="--data")
    return ValidationSet.open(shards, config, images=arguments.images, named="--images")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.evaluate", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    nll = commands.add_parser("nll", help="the variational bound in bits per dimension")
    steps = 'timesteps to visit, respaced as for sampling, such as "250" (default: all)'
    nll.add_argument("--steps", help=steps)
    accuracies = commands.add_parser("classifier", help="accuracy@1 and @5 by quarter of t")
    for command in (nll, accuracies):
        add = command.add_argument
        add("run", type=Path, help="a run, one of its checkpoints, or a weights file")
        data = "the shards, which the network has not learned from"
        add("--data", required=True, type=place_text, help=data)
        add("--images", type=int, help="so many, evenly spread over the shards (default: all)")
        add("--batch", type=int, default=64, help="images at once (default: %(default)s)")
        add("--preset", help="the preset of a weights file (default: the run's own)")
        add("--ema", type=float, help="which of the run's EMA decays (default: the first)")
        precision = "compute in this precision (default: as trained; fp32 on a CPU)"
        add("--precision", choices=sorted(DTYPES), help=precision)
        add("--out", type=Path, help="a .json for all values (default: none)")
        add_local_rank(command)
    return p
