"""`python -m trainer.train PRESET --run DIR`: train a preset, or go on with the run that is there.

Started by torchrun, mpirun, srun, `deepspeed` or alone. Ctrl-C or TERM saves and leaves with
status 75; the same command resumes. A finished run says so and leaves with status 0.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.preempt import Preemption

if __name__ == "__main__":
    # Importing torch takes seconds, in which a stop signal would kill the process.
    _EARLY = Preemption()
    _EARLY.record_early()

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from data import descriptors
from data.shards import open_shards
from data.stream import Batch, Stream, to_device
from launch.exits import TO_BE_CONTINUED
from launch.world import World, join
from launch.writer import stop_file
from trainer import checkpoint as checkpoints
from trainer import classes
from trainer import config as configs
from trainer.adm.objective import Classify, Denoise
from trainer.adm.timesteps import LossSecondMoment, UniformTimesteps
from trainer.adm.unet import ClassifierConfig, build
from trainer.checkpoint import Checkpoint, Saver
from trainer.config import Config
from trainer.draw import grid_numbers
from trainer.engine import (
    WEIGHTS,
    Engine,
    check_precision,
    kinds,
    load_mechanics,
    resolve_mechanics,
)
from trainer.group import Refused, agreed, connected, run_as_rank
from trainer.loop import Loop
from trainer.metrics import Board, Metrics
from trainer.run import Run
from trainer.watch import Watch


def build_objective(config: Config) -> Denoise | Classify:
    """The objective of a config: noising, loss and weighting."""
    seed, model = config.training.seed, config.model
    if isinstance(model, ClassifierConfig):
        return Classify(config.diffusion, seed=seed)
    adaptive = config.training.timesteps == "loss-second-moment"
    sampler = LossSecondMoment if adaptive else UniformTimesteps
    return Denoise(
        config.diffusion,
        timesteps=sampler(config.diffusion.steps, seed=seed),
        seed=seed,
        class_conditional=model.num_classes is not None,
        small_size=model.small_size,
    )


@dataclass(frozen=True)
class Plan:
    """All that was asked for, read and checked; nothing has been written or put on a GPU."""

    run: Run
    config: Config
    mechanics: dict[str, Any]
    stream: Stream
    #: The settings that this start changes in the run that is there.
    changes: Mapping[str, tuple[Any, Any]]
    #: The weights of `--init`.
    weights: Mapping[str, Tensor] | None

    @classmethod
    def make(cls, arguments: argparse.Namespace, *, ranks: int) -> "Plan":
        """Read and check what the command line names.

        Raises:
            ValueError: something is wrong with a preset, a setting, the shards, the run or a file.
        """
        config = configs.load(arguments.preset, arguments.set, absent=arguments.unset)
        mechanics = load_mechanics(arguments.ds_config)
        run = Run(arguments.run)
        stream = Stream(
            open_shards(config.data.shards, fetch=config.data),
            config=config.data,
            seed=config.training.seed,
        )
        classes.check(config, stream.shards, run=run)
        check_precision(config.training.precision)
        return cls(
            run=run,
            config=config,
            mechanics=resolve_mechanics(mechanics, config=config, ranks=ranks),
            stream=stream,
            changes=run.check(config),
            weights=_initial_weights(arguments.init, config) if arguments.init else None,
        )


def train(
    arguments: argparse.Namespace,
    *,
    world: World,
    device: torch.device,
    preemption: Preemption,
    watch: Watch,
) -> int:
    """Check everything, take hold of the run, and train it; returns the exit status."""
    plan = agreed(lambda: Plan.make(arguments, ranks=world.size))
    with ExitStack() as stack:
        run = agreed(lambda: stack.enter_context(plan.run.claimed()) if world.is_main else plan.run)
        watch.tell = run.log_loss
        if world.is_main:
            plan.stream.log = run.log
        return _train(replace(plan, run=run), world=world, device=device, preemption=preemption,
                      watch=watch)  # fmt: skip


def _train(
    plan: Plan, *, world: World, device: torch.device, preemption: Preemption, watch: Watch
) -> int:
    """Decide where the run starts from, and train it from there."""
    config, run = plan.config, plan.run
    log = run.log if world.is_main else lambda _: None
    if _is_asked_to_stop(run):
        log(f"asked to stop: `python -m launch` goes on with it, or remove {stop_file(run.path)}")
        return 0
    if _is_told_to_leave(preemption, log=log):
        return TO_BE_CONTINUED
    watch.mark("verifying checkpoints")
    found = _resume_point(plan, world=world)
    images = 0 if found is None else found.images
    if images >= config.training.images:
        log(f"the run is finished: {images:,} images")
        return 0
    if _is_told_to_leave(preemption, log=log):
        return TO_BE_CONTINUED
    if world.is_main:
        run.open(config, mechanics=plan.mechanics)
    for name, (before, now) in plan.changes.items():
        log(f"{name} changes from {before!r} to {now!r}")
    if line := classes.untrained(config, plan.stream.shards):
        log(line)
    watch.mark("building the engine")
    engine, objective = _start(plan, found, device=device)
    begins = "starts" if found is None else f"resumes from checkpoint {found.path.name}"
    facts = _facts(config, engine=engine, world=world)
    log(f"{begins}: {facts}, {classes.extent(config, plan.stream.shards)}")
    if _is_told_to_leave(preemption, log=log):
        return TO_BE_CONTINUED
    with ExitStack() as stack:
        stream = stack.enter_context(plan.stream)
        board = None
        if world.is_main:
            text = configs.to_toml(config)
            board = stack.enter_context(Board(run.path, images=images, config=text))
        loop = Loop(
            config=config,
            run=run,
            world=world,
            engine=engine,
            objective=objective,
            saver=_saver(plan, world=world),
            metrics=Metrics(world=world, device=device, timesteps=config.diffusion.steps),
            board=board,
            images=images,
            order=stream.identity,
            shown=_shown(plan, world=world),
            told_to_stop=lambda: preemption.requested is not None or run.is_asked_to_stop,
            mark=watch.mark,
        )
        batches = stream.batches(
            images=images,
            batch=config.training.batch,
            micro_batch=engine.micro_batch,
            rank=world.rank,
            ranks=world.size,
            pin=device.type == "cuda",
        )
        return loop.train(to_device(batches, device=device))


def _initial_weights(file: Path, config: Config) -> Mapping[str, Tensor]:
    weights = checkpoints.load_weights(file)
    with torch.device("meta"):
        checkpoints.check_fit(build(config.model), weights, source=f"--init {file}")
    return weights


def _is_asked_to_stop(run: Run) -> bool:
    """Whether `launch stop` came before this start, as it may where a launcher starts again."""
    asked = [run.is_asked_to_stop]  # the main rank's, which holds the run
    dist.broadcast_object_list(asked)
    return asked[0]


def _is_told_to_leave(preemption: Preemption, *, log: Callable[[str], None]) -> bool:
    """Whether a signal has reached any rank before the first step, so that nothing is to save."""
    told = torch.tensor(preemption.requested is not None, dtype=torch.int32)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    if told:
        log("stopped by a signal before the first step; the same command goes on")
    return bool(told)


def _resume_point(plan: Plan, *, world: World) -> Checkpoint | None:
    """The newest whole checkpoint of the run, if it has any; damaged ones are passed over aloud.

    Raises:
        Refused: all its checkpoints are damaged, or were trained on other images.
    """
    found, damaged = checkpoints.latest_valid(
        plan.run.checkpoints, kinds=kinds(plan.config.training.ema), world=world
    )
    if world.is_main:
        for line in damaged:
            plan.run.log(line)
    if found is None and damaged:
        raise Refused(
            f"no checkpoint of {plan.run.path} is whole; to start from the beginning, move "
            f"{plan.run.checkpoints} away"
        )
    if found is not None:
        agreed(lambda: plan.stream.check_identity(found.state["order"]))
    return found


def _start(
    plan: Plan, found: Checkpoint | None, *, device: torch.device
) -> tuple[Engine, Denoise | Classify]:
    """The engine and the objective where the run begins.

    The weights come from 1. the run's own checkpoint, 2. `--init`, 3. the seed.
    """
    torch.manual_seed(plan.config.training.seed)
    net = build(plan.config.model)
    if found is not None:
        file = found.file(WEIGHTS)
        checkpoints.fill(net, checkpoints.load_weights(file), source=file)
    elif plan.weights is not None:
        checkpoints.fill(net, plan.weights, source="--init")
    engine = Engine(net, config=plan.config, mechanics=plan.mechanics, device=device)
    objective = build_objective(plan.config)
    if found is not None:
        for kind in engine.kinds[1:]:
            with safe_open(found.file(kind), framework="pt") as file:
                engine.scatter(kind, file.get_tensor)
        engine.load_scalars(found.state["engine"])
        objective.timesteps.load(found.state["timesteps"])
    return engine, objective


def _shown(plan: Plan, *, world: World) -> Batch | None:
    """The first images of the shards, for an upsampler to enlarge in its grids."""
    config = plan.config
    if config.intervals.samples is None or getattr(config.model, "small_size", None) is None:
        return None
    share = len(grid_numbers(config.intervals, world=world))
    return next(plan.stream.once(micro_batch=share, rank=world.rank, ranks=world.size))


def _saver(plan: Plan, *, world: World) -> Saver:
    every = plan.config.intervals
    return Saver(
        plan.run.checkpoints,
        world=world,
        keep=every.keep,
        keep_every=every.keep_every,
        check_writer=plan.run.check_writer,
        log=plan.run.log,
    )


def _facts(config: Config, *, engine: Engine, world: World) -> str:
    """What runs, on what, in one line."""
    cut = f"{world.size} x {engine.accumulation} x {engine.micro_batch}"
    return (
        f"{config.objective}, {engine.parameters:,} parameters, {config.training.precision}, "
        f"{world.size} ranks ({world.launcher}) on {engine.device.type}, ZeRO-{engine.stage}, "
        f"batch {config.training.batch} = {cut}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m trainer.train", description=__doc__)
    p.add_argument("preset", help="a name in trainer/presets, or a .toml file")
    p.add_argument("--run", required=True, type=Path, help="the run directory")
    p.add_argument("--set", action="append", default=[], metavar="'training.lr = 1e-4'")
    p.add_argument("--unset", action="append", default=[], metavar="training.clip")
    p.add_argument("--ds-config", default="ds_config.json", help="DeepSpeed's mechanics")
    p.add_argument("--init", type=Path, help="start from these weights (.safetensors, .pt)")
    p.add_argument("--ranks", type=int, help="refuse to start with another number of ranks")
    p.add_argument("--patience", type=float, default=600.0, metavar="SECONDS",
                   help="end the job when a rank is lost or hung for so long")  # fmt: skip
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # `deepspeed` passes it
    return p


def main(argv: Sequence[str] | None = None, *, preemption: Preemption | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    descriptors.raise_limit()
    world = join(expected_size=arguments.ranks)
    with (
        preemption or Preemption() as preemption,
        connected(world, patience=arguments.patience) as device,
        Watch(world, patience=arguments.patience) as watch,
    ):
        return train(arguments, world=world, device=device, preemption=preemption, watch=watch)


if __name__ == "__main__":
    run_as_rank(lambda: main(preemption=_EARLY))
