"""Validation: the loss over a second set of images, with the averaged and the current weights.

Each image has a timestep and noise of its own, the same in every run. The images are cut into fixed
parts, which the ranks take in turn, and all images' values are added up in one order: the result is
the same on any number of ranks. No state of the training is changed, no random state either.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from data import files
from data.dataset import Shards, open_shards
from data.mixture import Dataset
from data.progress import Progress
from data.stream import Batch, Stream, to_device
from trainer import classes
from trainer.adm.config import check
from trainer.config.experiment import Config
from trainer.engine import averages
from trainer.engine.copies import network_of
from trainer.engine.zero import WEIGHTS, Engine
from trainer.ranks.group import Agreement, agreed, from_main, gather
from trainer.ranks.world import World
from trainer.run.checkpoint import VALIDATION
from trainer.run.directory import Run
from trainer.start import build_objective
from trainer.watch.metrics import QUARTERS

# The seed of t and noise, whatever that of the run, so that losses of runs can be compared.
SEED = 0

Terms = Callable[[Batch], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ValidationSet:
    """Images that a run does not learn from."""

    stream: Stream
    images: int
    #: What the log says of them where the run learns from these images too, or may do so.
    shared: str = ""

    @classmethod
    def open(
        cls,
        shards: Shards,
        config: Config,
        *,
        images: int | None = None,
        named: str = "data.validation_images",
    ) -> "ValidationSet":
        """All images of `shards`, or `images` evenly spread ones; ValueError if there are fewer.

        `named` is the setting or option that gives their number.
        """
        enough = images is None or images <= shards.count
        check(enough, named, images, f"at most {shards.count}, as {shards.where} has")
        alone = replace(config.data, shards=shards.root, mix=(), mix_shares=())
        data = replace(alone, crop="center", flip=False, streams=1)
        return cls(Stream(shards, config=data, seed=SEED), images or shards.count)

    @classmethod
    def of(
        cls, config: Config, *, training: Dataset, check_files: bool = True
    ) -> "ValidationSet | None":
        """The images of data.validation; None if it is absent. `check_files` checks shards' sizes.

        Raises:
            ValueError: there are no such shards, their classes differ from those of `training`, or
                they have too few images.
        """
        root, images = config.data.validation, config.data.validation_images
        if root is None:
            return None
        shards = open_shards(
            root, fetch=config.data, check_files=check_files, named="data.validation"
        )
        classes.check_held_out(config, shards, training=training.classes, named="data.validation")
        found = cls.open(shards, config, images=images)
        found.stream.require_room(config.training.micro_batch)
        held_out = shards.made_by.get("split") == "val"
        if held_out and all(part.made_by.get("split") != "train" for part in training.parts):
            shared = " (--split val), which the training shards may hold too (no --split train),"
            return replace(found, shared=shared)
        if shards.fingerprint == training.fingerprint:
            return replace(found, shared=", which is the training set itself")
        return found

    def table(
        self,
        terms: Terms,
        *,
        batch_size: int,
        world: World,
        device: torch.device,
        stopped: Callable[[], bool],
        on_images: Callable[[int], None],
    ) -> dict[str, Tensor] | None:
        """The `terms` of every image, by name: float64 (N,) on the CPU, in the images' order.

        `terms` is called with a batch at a time, on the device, and returns values (B,).
        `on_images` is called with the number of images done. All ranks must call it and get the
        same; None if one of them was `stopped`.

        Raises:
            Refused, Broken: a file is damaged or cannot be read, or the shards were packed anew.
        """
        from_main(self.stream.check_unchanged)
        parts = self.stream.parts(
            images=self.images,
            size=batch_size,
            rank=world.rank,
            ranks=world.size,
            pin=device.type == "cuda",
        )
        batches = to_device(parts, device=device)
        rounds = -(-self.images // (batch_size * world.size))
        agreement, mine = Agreement(1), list[dict[str, Tensor]]()
        leave, fault = False, None
        for _ in range(rounds):
            (leave,) = agreement.exchange(stopped() or fault is not None)
            if leave:
                break
            try:
                if (batch := next(batches, None)) is not None:
                    found = {"index": batch.indices, **terms(batch)}
                    mine.append({name: v.double().cpu() for name, v in found.items()})
                    on_images(len(batch.indices) * world.size)
            except (ValueError, OSError) as error:  # a damaged image; the others must not wait
                fault = error
        agreement.close()
        agreed(lambda: _raise(fault))
        return None if leave else _in_order(gather(mine))


def _raise(fault: Exception | None) -> None:
    if fault is not None:
        raise fault


def _in_order(everyone: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """All parts' columns, in the order of the images."""
    parts = [part for parts in everyone for part in parts]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = columns.pop("index").argsort()
    return {name: values[order] for name, values in columns.items()}


def means(table: Mapping[str, Tensor], *, timesteps: int) -> dict[str, float]:
    """The mean of each column (N,), and of its images in each quarter of t: "NAME/q0" to "q3"."""
    quarter = table["t"].long() * QUARTERS // timesteps
    found = {}
    for name, values in table.items():
        if name in ("t", "unweighted"):
            continue
        found[name] = float(values.mean())
        for q in range(QUARTERS):
            if (quarter == q).any():
                found[f"{name}/q{q}"] = float(values[quarter == q].mean())
    return found


class Validation:
    """Validates a run. All ranks make each call together."""

    def __init__(self, images: ValidationSet, *, config: Config, world: World) -> None:
        fixed = replace(config.training, seed=SEED, timesteps="uniform", label_dropout=0.0)
        self._objective = build_objective(config, training=fixed)
        self._set, self._config, self._world = images, config, world

    def measure(
        self, engine: Engine, *, mark: Callable[[str], None], stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """ "validation/NAME" with the first EMA, and "validation/raw/NAME" with the weights.

        NAME is each of `means` of the objective's terms. None if a rank was `stopped`.

        Raises:
            Refused, Broken: as `ValidationSet.table`.
        """
        first = averages.exponential(self._config.training.ema[0])
        total = 2 * self._set.images
        shown = self._world.is_main
        progress = Progress(total=total, unit="images of validation", shown=shown)

        def on_images(count: int) -> None:
            mark("validating")
            progress.advance(count)

        found: dict[str, float] = {}
        for group, kind in (("validation", first), ("validation/raw", WEIGHTS)):
            with engine.weights(kind) as tensors, torch.no_grad():
                net = network_of(self._config, tensors).eval()
                table = self._set.table(
                    partial(self._terms, net),
                    batch_size=self._config.training.micro_batch,
                    world=self._world,
                    device=engine.device,
                    stopped=stopped,
                    on_images=on_images,
                )
            if table is None:
                return None
            each = means(table, timesteps=self._config.diffusion.steps)
            found |= {f"{group}/{name}": value for name, value in each.items()}
        return found

    def _terms(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self._objective(net, batch.images, batch.labels, batch.indices)

    def cost(self) -> str:
        """A line for the log: the share of the training's compute that validation takes."""
        every = self._config.intervals.validate
        assert every is not None
        # An image of training costs three forward passes, of validation one for each of two nets.
        share = 2 * self._set.images / (3 * every)
        where = f"{self._set.stream.shards.where}{self._set.shared}"
        return (
            f"validation: {self._set.images:,} images of {where} every {every:,}, "
            f"about {share:.1%} of the training's compute"
        )

    def note(self, found: Mapping[str, float], run: Run, *, images_seen: int) -> None:
        """Keep the result with the checkpoint of the same clock, if there is one."""
        checkpoint = run.checkpoints / f"{images_seen:012d}"
        if checkpoint.is_dir():
            of = {"fingerprint": self._set.stream.shards.fingerprint, "count": self._set.images}
            text = json.dumps({"loss": found["validation/loss"], **of, "values": found}, indent=1)
            run.attempt(VALIDATION, lambda: files.write(checkpoint / VALIDATION, text))

    def describe(self, found: Mapping[str, float] | None, *, seconds: float) -> str:
        """A line for the log."""
        if found is None:
            return "the validation was interrupted"
        shares = "".join(
            f", {words} {found[f'validation/{name}']:.1%}"
            for name, words in (("acc1", "accuracy@1"), ("acc5", "accuracy@5"))
            if f"validation/{name}" in found
        )
        loss, raw = found["validation/loss"], found["validation/raw/loss"]
        return (
            f"validation on {self._set.images:,} images: loss {loss:.4f}{shares} "
            f"(without EMA {raw:.4f}), {seconds:.1f} s"
        )
