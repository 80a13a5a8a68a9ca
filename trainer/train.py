"""`python -m trainer.train PRESET --run DIR`: train a preset, or resume the run that is there."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainer.ranks.signals import Preemption

if __name__ == "__main__":
    # Importing torch takes seconds, in which a stop signal would kill the process.
    _EARLY = Preemption()
    _EARLY.record_early()

import torch

from data.exits import TO_BE_CONTINUED
from data.stream import Stream, open_stream, to_device
from data.version import version
from trainer import classes, common, profiling, start
from trainer import initial as initials
from trainer.adm.objective import Objective
from trainer.config import ds_config as ds_configs
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine import compute, determinism, operators
from trainer.engine.policy import Guards
from trainer.engine.zero import Engine, check_precision
from trainer.evaluation.in_training import Evaluation
from trainer.guards.incidents import failed_gpus_noted
from trainer.initial import Initial
from trainer.loop import Loop
from trainer.measures import missing
from trainer.options import parser
from trainer.ranks import process
from trainer.ranks.context import RankContext
from trainer.ranks.ending import no_exit, run_as_rank
from trainer.ranks.group import agreed, from_main
from trainer.ranks.process_group import connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join
from trainer.run import lease as leases
from trainer.run.directory import Run
from trainer.run.goback import go_back
from trainer.run.lease import way_to_resume
from trainer.sampling.draw import check_grids
from trainer.saver import Saver
from trainer.validation import ValidationSet
from trainer.watch import forensics, wandb
from trainer.watch.board import Board
from trainer.watch.metrics import Metrics
from trainer.watch.mfu import Mfu


@dataclass(frozen=True)
class TrainingPlan:
    """All that was asked for, read and checked; nothing has been written or put on a GPU."""

    run: Run
    config: Config
    ds_config: dict[str, Any]
    stream: Stream
    validation: ValidationSet | None
    #: The settings that this start changes in the run that is there.
    changes: Mapping[str, tuple[Any, Any]]
    #: The checkpoint of `--from`, which the run goes back to.
    back: str | None
    #: Steps to profile.
    profile: int
    #: The figures of samples, if the config asks for them, as far as they need no GPU's time.
    evaluation: Evaluation | None = None
    #: The weights of `--init`, where the run starts from them.
    initial: Initial | None = None

    @classmethod
    def make(
        cls, arguments: argparse.Namespace, *, ranks: int, check_files: bool = True
    ) -> "TrainingPlan":
        """Read and check what the command line names; with `check_files`, also each shard's size.

        Raises:
            ValueError: something is wrong with a preset, a setting, the shards, the run or a file.
        """
        run = Run(arguments.run)
        config = run.adopt(configs.load(arguments.preset, arguments.set, unset=arguments.unset))
        read = ds_configs.load(arguments.ds_config)
        ds_config = ds_configs.resolve(read, config=config, ranks=ranks)
        stream = open_stream(config.data, seed=config.training.seed, check_files=check_files)
        classes.check(config, stream.shards, run=run)
        stream.require_room(config.training.micro_batch_on(ranks))
        check_grids(config, stream.shards, ranks=ranks)
        check_precision(config.training.precision)
        wandb.check(config.board.wandb)
        compute.check(config.training)
        operators.prepare()
        operators.locks()
        return cls(
            run=run,
            config=config,
            ds_config=ds_config,
            stream=stream,
            validation=ValidationSet.of(config, training=stream.shards, check_files=check_files),
            changes=run.check(config) | ds_configs.changes(run.path / "ds_config.json", ds_config),
            back=vars(arguments)["from"],
            profile=arguments.profile,
        )

    def facts(self, arguments: argparse.Namespace) -> dict[str, str]:
        """What must be the same on all ranks."""
        validation = self.validation.stream.shards if self.validation else None
        return common.facts(
            self.config,
            ds_config=self.ds_config,
            datasets={"data.shards": self.stream.shards, "data.validation": validation},
            options=arguments,
        )

    def with_reference(
        self, *, mark: Callable[[str], None], say: Callable[[str], None]
    ) -> "TrainingPlan":
        """This plan with the features that samples are compared with. All ranks must call it."""
        if self.evaluation is None:
            return self
        return replace(self, evaluation=self.evaluation.with_reference(mark=mark, say=say))


def train(arguments: argparse.Namespace, *, context: RankContext) -> int:
    """Check everything, claim the run, and train it; returns the exit status."""
    world = context.world
    # One rank of each node looks at the shards: all ranks would ask a file system a million times.
    check_files = world.local_rank == 0
    plan = agreed(lambda: TrainingPlan.make(arguments, ranks=world.size, check_files=check_files))
    common.check(plan.facts(arguments))
    initial = from_main(lambda: initials.choose(arguments, run=plan.run, config=plan.config))
    evaluation = Evaluation.open(
        plan.config, validation=plan.validation, world=world, device=context.device
    )
    with ExitStack() as stack:
        mark = context.watchdog.mark
        claimed = plan.run.claimed(mark=mark)
        run = agreed(lambda: stack.enter_context(claimed) if world.is_main else plan.run)
        stack.enter_context(no_exit())
        run = replace(run, token=from_main(lambda: run.token))
        machine = from_main(process.machine)
        agreed(lambda: leases.check_seen(run.path, token=run.token, machine=machine, mark=mark))
        # The state is written before the claim of the run ends.
        stack.push(context.watchdog.on_error)
        context.watchdog.tell = run.log_lost_rank
        context.watchdog.dump = lambda: forensics.dump(run.path / "launch", rank=world.rank)
        if world.is_main:
            plan.stream.log = run.log
            run.log(f"adm-trainer {version()}, torch {torch.__version__}")
        plan = replace(plan, run=run, initial=initial, evaluation=evaluation)
        return _train(plan, context=context)


def _train(plan: TrainingPlan, *, context: RankContext) -> int:
    """Decide where the run starts from, and train it from there."""
    config, run, world = plan.config, plan.run, context.world
    log = run.log if world.is_main else lambda _: None
    if from_main(lambda: run.stop_requested):
        log(f"stop requested; {way_to_resume(run.path)}")
        return _leave(plan, context, status=0, state="stopped", why="by `python -m launch stop`")
    if context.must_leave():
        return _leave_early(plan, context, log=log)
    context.watchdog.mark("verifying checkpoints")
    if (back := plan.back) is not None:
        check = partial(start.check_found, run=run, config=config, stream=plan.stream)
        from_main(lambda: go_back(run, back, check=check))
    found = start.resume_point(run, config=config, stream=plan.stream, world=world)
    images_seen = 0 if found is None else found.images_seen
    if world.is_main:
        start.note(run, found)
    if images_seen >= config.training.images and not missing(run, config, images_seen=images_seen):
        log(f"the run is finished: {images_seen:,} images; to train longer, raise training.images")
        return _leave(plan, context, status=0, state="finished")
    if context.must_leave():
        return _leave_early(plan, context, log=log)
    from_main(lambda: run.open(config, ds_config=plan.ds_config))
    if found is None:
        from_main(lambda: initials.record(plan.initial, run=run))
    shards, ds_config = plan.stream.shards, plan.ds_config
    locks = agreed(operators.locks)
    held_out = plan.validation.stream.shards if plan.validation else None
    said = start.remarks(
        config, plan.changes, shards, held_out, ranks=world.size, ds_config=ds_config
    )
    said += initials.remarks(plan.initial, shards=shards)
    newer = common.changes_since(found.state) if found else []
    for line in [*newer, *said, *locks, *operators.notice()]:
        log(line)
    plan = plan.with_reference(mark=context.watchdog.mark, say=log)
    context.watchdog.mark("; ".join(["building the engine", *locks]))
    begun = start.begin(
        config, ds_config=ds_config, found=found, initial=plan.initial, context=context, log=log
    )
    if begun is None or context.must_leave():
        return _leave_early(plan, context, log=log)
    begins = start.beginning(found=found, initial=plan.initial)
    log(f"{begins}: {start.describe(config, begun[0], world=world, shards=shards)}")
    return _loop(plan, context, begun=begun, images_seen=images_seen)


def _loop(
    plan: TrainingPlan,
    context: RankContext,
    *,
    begun: tuple[Engine, Objective, Guards],
    images_seen: int,
) -> int:
    """Train from the clock `images_seen`; returns the exit status."""
    engine, objective, guards = begun
    config, run, world = plan.config, plan.run, context.world
    mark = context.watchdog.mark
    saver = Saver(run, world=world, intervals=config.intervals, mark=mark)
    saver.check_disk(engine)
    with ExitStack() as stack:
        stack.enter_context(forensics.out_of_memory_kept(run.path / "launch", rank=world.rank))
        stream = stack.enter_context(plan.stream)
        profiler = profiling.profiled(plan.profile, run=run, is_main=world.is_main)
        mfu = Mfu.measure(config, device=context.device)
        board = agreed(lambda: _board(plan, images_seen, mfu=mfu) if world.is_main else None)
        stack.enter_context(board or nullcontext())
        loop = Loop(
            config=config,
            run=run,
            world=world,
            engine=engine,
            objective=objective,
            saver=saver,
            metrics=Metrics(
                world=world,
                device=context.device,
                timesteps=config.diffusion.steps,
                clock=context.watchdog.clock,
                is_own_time=engine.stage < 3,
            ),
            validation_set=plan.validation,
            evaluation=plan.evaluation,
            board=board,
            images_seen=images_seen,
            guards=guards,
            stream=stream,
            stop_requested=lambda: context.stop_requested or run.stop_requested,
            mark=mark,
            after_step=stack.enter_context(profiler),
        )
        batches = stream.batches(
            images_seen=images_seen,
            batch_size=config.training.batch,
            micro_batch_size=engine.micro_batch,
            rank=world.rank,
            ranks=world.size,
            pin=context.device.type == "cuda",
        )
        return loop.train(to_device(batches, device=context.device))


def _board(plan: TrainingPlan, images_seen: int, *, mfu: Mfu) -> Board:
    plan.run.log(f"{mfu}")
    return Board(plan.run, config=plan.config, images_seen=images_seen, mfu=mfu)


def _leave_early(plan: TrainingPlan, context: RankContext, *, log: Callable[[str], None]) -> int:
    log(f"stopped by a signal before the first step; {way_to_resume(plan.run.path)}")
    why = "by a signal before the first step"
    return _leave(plan, context, status=TO_BE_CONTINUED, state="stopped", why=why)


def _leave(
    plan: TrainingPlan, context: RankContext, *, status: int, state: str, why: str | None = None
) -> int:
    """Note how a start ended that did not train."""
    if context.world.is_main:
        plan.run.note(state=state, why=why)
    return status


def main(argv: Sequence[str] | None = None, *, preemption: Preemption | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    world = join(expected_size=arguments.ranks)
    determinism.prepare(arguments.preset, arguments.set, unset=arguments.unset)
    with (
        preemption or Preemption() as preemption,
        failed_gpus_noted(arguments.run, world=world),
        connected(world, patience=arguments.patience, gpus=arguments.gpus) as device,
        Watchdog(world, patience=arguments.patience) as watchdog,
    ):
        context = RankContext(world=world, device=device, preemption=preemption, watchdog=watchdog)
        return train(arguments, context=context)


if __name__ == "__main__":
    run_as_rank(lambda: main(preemption=_EARLY))
