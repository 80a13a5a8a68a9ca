"""Where a run begins: its newest valid checkpoint, the weights of `--init`, or its seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data import files
from data.mixture import Dataset
from data.stream import Stream, data_remarks
from trainer import classes, weights
from trainer.adm.config import ClassifierConfig
from trainer.adm.objective import Classify, Denoise, Objective
from trainer.adm.timesteps import LossSecondMoment, UniformTimesteps
from trainer.adm.unet import build
from trainer.config.experiment import Config
from trainer.config.sections import TrainingConfig
from trainer.engine import averages, compute, determinism
from trainer.engine.policy import Guards
from trainer.engine.zero import WEIGHTS, Engine, kinds, load_operator
from trainer.initial import Initial
from trainer.planning import prediction
from trainer.ranks.context import RankContext
from trainer.ranks.faults import Refused
from trainer.ranks.group import agreed
from trainer.ranks.world import World
from trainer.run import checkpoint as checkpoints
from trainer.run.checkpoint import Checkpoint
from trainer.run.directory import Run
from trainer.run.runstate import RunState, committed
from trainer.watch.metrics import Metrics


@dataclass(kw_only=True)
class Parts:
    """What a run trains with on this rank; the loop and all that belongs to it share these."""

    config: Config
    run: Run
    world: World
    engine: Engine
    objective: Objective
    guards: Guards
    #: Its identity makes the order of the data; kept in checkpoints, and checked on resume.
    stream: Stream
    metrics: Metrics
    #: Tells the watchdog that this rank has made progress, and what it does next.
    mark: Callable[[str], None]

    def log(self, text: str) -> None:
        """A line in the run's log, from the main rank alone."""
        if self.world.is_main:
            self.run.log(text)


def resume_point(run: Run, *, config: Config, stream: Stream, world: World) -> Checkpoint | None:
    """The newest valid checkpoint of the run, if it has any. All ranks must call it.

    Damaged ones that are newer are named in the log and moved away, so that they take no place
    among the newest that are kept.

    Raises:
        Refused: all its checkpoints are damaged, or were trained on other images; or steps of
            another batch do not lead from there to the end.
    """
    found, damaged = checkpoints.latest_valid(
        run.checkpoints, kinds=kinds(config.training), world=world
    )
    if world.is_main:
        for path, fault in damaged.items():
            run.log(f"checkpoint {path.name} is damaged and skipped: {fault}")
    if found is None and damaged:
        raise Refused(
            f"no checkpoint of {run.path} is valid; to start from the beginning, move "
            f"{run.checkpoints} away"
        )
    if found is not None:
        agreed(lambda: check_found(found, run=run, config=config, stream=stream))
        if world.is_main:
            for path in damaged:
                _move_away(path, run=run)
    return found


def check_found(found: Checkpoint, *, run: Run, config: Config, stream: Stream) -> None:
    """Raise ValueError unless the run may go on from a checkpoint.

    It was trained on these images, and steps of `training.batch` lead from there to the end.
    """
    stream.check_identity(found.state.order)
    batch, seen = config.training.batch, found.images_seen
    if seen >= config.training.images or seen % batch == 0:
        return
    names = [path.name for path in committed(run.checkpoints)]
    older = next((name for name in names if int(name) < seen and int(name) % batch == 0), None)
    ways = ["keep the batch that it has", *([f"go back with --from {older}"] if older else [])]
    raise ValueError(
        f"training.batch = {batch}: must divide the {seen:,} images that the run has seen: "
        + ", or ".join(ways)
    )


def _move_away(path: Path, *, run: Run) -> None:
    try:
        files.set_aside(path, "damaged")
    except OSError as error:
        run.log(f"cannot rename {path}: {files.reason(error)}")


def note(run: Run, found: Checkpoint | None) -> None:
    """Note where the run begins, and log that the checkpoints of an earlier start are gone."""
    before = RunState.read(run.path)
    if found is None and before is not None and before.checkpoint is not None:
        run.log(
            f"{run.checkpoints} has no checkpoint, though {before.checkpoint} was committed: "
            "the run starts from the beginning"
        )
    run.note(
        images_seen=0 if found is None else found.images_seen,
        checkpoint=None if found is None else found.path.name,
    )


def begin(
    config: Config,
    *,
    ds_config: dict[str, Any],
    found: Checkpoint | None,
    initial: Initial | None,
    context: RankContext,
    log: Callable[[str], None],
) -> tuple[Engine, Objective, Guards] | None:
    """The engine, the objective and the guards where the run begins; None if a signal came before.

    The weights come from 1. the run's own checkpoint, 2. `--init`, 3. the seed. The main rank alone
    reads or draws them; of all other state each rank reads its own part.
    """
    determinism.apply(config.training.deterministic)
    with torch.device("meta"):
        net = build(config.model)

    def say(text: str) -> None:
        context.watchdog.mark(text)
        log(text)

    stage, training = ds_config["zero_optimization"]["stage"], config.training
    compute.prepare(net, training=training, device=context.device, stage=stage, say=say)
    main = context.world.is_main
    start = agreed(lambda: _start(config, found=found, initial=initial) if main else None)
    agreed(lambda: load_operator(stopped=lambda: context.stop_requested))
    if context.must_leave():
        return None
    # Not `agreed`: the ranks meet in it, and would wait there for one that has failed alone.
    engine = Engine(net, config=config, ds_config=ds_config, device=context.device, start=start)
    objective = build_objective(config)
    guards = Guards(config)
    if found is not None:
        restore(found, engine.kinds[1:], engine=engine, objective=objective)
        guards.load(found.state.guards)
    return engine, objective, guards


def restore(
    found: Checkpoint, kinds: Sequence[str], *, engine: Engine, objective: Objective
) -> None:
    """Take these kinds of state, and what is not a tensor, from a checkpoint."""
    for kind in kinds:
        # Mapped: a rank reads no more than its part of each tensor.
        with safe_open(found.file(kind), framework="pt") as tensors:
            engine.scatter(kind, tensors.get_tensor)
    engine.load_scalars(found.state.engine)
    objective.timesteps.load(found.state.timesteps)


def remarks(
    config: Config,
    changes: Mapping[str, tuple[Any, Any]],
    shards: Dataset,
    held_out: Dataset | None,
    *,
    ranks: int,
    ds_config: Mapping[str, Any],
) -> list[str]:
    """What the log says of the config, and its `changes` of the run, before the run begins."""
    changed = [f"{name} changes from {a!r} to {b!r}" for name, (a, b) in changes.items()]
    odd = [
        averages.described(config.training),
        classes.untrained(config, shards),
        *data_remarks(shards, held_out=held_out, config=config.data),
        config.training.badly_cut_on(ranks),
    ]
    zero = ds_config["zero_optimization"]
    said = compute.remarks(config.training, stage=zero["stage"], ranks=ranks)
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties().total_memory
        odd.append(prediction.memory_remark(config, zero=zero, ranks=ranks, room=room))
    return [*changed, *said, *(line for line in odd if line)]


def _start(
    config: Config, *, found: Checkpoint | None, initial: Initial | None
) -> Mapping[str, Tensor]:
    """The fp32 weights that the run starts from, by parameter name."""
    if initial is not None and found is None:
        return initial.load(config)
    if found is None:
        torch.manual_seed(config.training.seed)
        return build(config.model).state_dict()
    file = found.file(WEIGHTS)
    loaded = weights.load(file)
    with torch.device("meta"):
        weights.check_fit(build(config.model).state_dict(), loaded, source=file)
    return loaded


def beginning(*, found: Checkpoint | None, initial: Initial | None) -> str:
    """Where the run begins, in words."""
    if found is not None:
        return f"resumes from checkpoint {found.path.name}"
    return "starts" if initial is None else f"starts from {initial}"


def describe(config: Config, engine: Engine, *, world: World, shards: Dataset) -> str:
    """What runs, and on what."""
    cut = f"{world.size} x {engine.accumulation} x {engine.micro_batch}"
    return (
        f"{config.objective}, {engine.parameter_count:,} parameters, "
        f"{config.training.precision}, {world.size} ranks ({world.launcher}) on "
        f"{engine.device.type}, ZeRO-{engine.stage}, batch {config.training.batch} = {cut}, "
        f"{classes.extent(config, shards)}"
    )


def build_objective(config: Config, *, training: TrainingConfig | None = None) -> Objective:
    """The objective of a config, or of other settings of `training`: noising, loss, weighting."""
    training = training or config.training
    seed, model = training.seed, config.model
    if isinstance(model, ClassifierConfig):
        return Classify(config.diffusion, seed=seed)
    samplers = {"uniform": UniformTimesteps, "loss-second-moment": LossSecondMoment}
    return Denoise(
        config.diffusion,
        timesteps=samplers[training.timesteps](config.diffusion.steps, seed=seed),
        seed=seed,
        class_conditional=model.num_classes is not None,
        small_size=model.small_size,
        label_dropout=training.label_dropout,
    )
