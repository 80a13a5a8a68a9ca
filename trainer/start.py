"""Where a run begins: its newest valid checkpoint, the weights of `--init`, or its seed."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root

from data.dataset import Shards
from data.progress import duration
from data.samples import crop_remark
from data.stream import Stream
from trainer import averages, classes, compute, determinism, weights
from trainer import checkpoint as checkpoints
from trainer.adm.config import ClassifierConfig
from trainer.adm.objective import Classify, Denoise
from trainer.adm.timesteps import LossSecondMoment, UniformTimesteps
from trainer.adm.unet import build
from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.engine import WEIGHTS, Engine, kinds
from trainer.ranks.group import Refused, agreed
from trainer.ranks.world import World
from trainer.run import Run


def initial_weights(file: Path, config: Config) -> dict[str, Tensor]:
    """The weights of `--init`, by parameter name.

    Raises:
        ValueError: they cannot be read, or are not those of the config's network.
    """
    loaded = weights.load(file)
    with torch.device("meta"):
        weights.check_fit(build(config.model), loaded, source=f"--init {file}")
    return loaded


def compile_locks(*, stale: float = 3600.0) -> list[str]:
    """What is to be said of locks of operators that torch compiles; DeepSpeed waits for them.

    Raises:
        ValueError: one is older than `stale` seconds, so that nothing is compiling there.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    names = "*/lock" if root else f"{python}_*/*/lock"
    said = []
    for lock in sorted(Path(root or get_default_build_root()).glob(names)):
        with suppress(FileNotFoundError):  # it was released just now
            age = time.time() - lock.stat().st_mtime
            made = f"{lock} was made {duration(age)} ago by a process that compiles"
            if age > stale:
                raise ValueError(f"{made}, and was killed meanwhile: delete it")
            said.append(f"{made}; this start waits for it. If nothing compiles there, delete it")
    return said


def resume_point(run: Run, *, config: Config, stream: Stream, world: World) -> Checkpoint | None:
    """The newest valid checkpoint of the run, if it has any. All ranks must call it.

    Damaged ones that are newer are named in the log and moved away, so that they take no place
    among the newest that are kept.

    Raises:
        Refused: all its checkpoints are damaged, or were trained on other images.
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
        agreed(lambda: stream.check_identity(found.state.order))
        if world.is_main:
            for path in damaged:
                _move_away(path, run=run)
    return found


def _move_away(path: Path, *, run: Run) -> None:
    to = path.with_name(f"{path.name}.damaged")
    try:
        path.rename(to if not to.exists() else f"{to}.{time.time_ns()}")
    except OSError as error:
        run.log(f"cannot rename {path}: {error}")


def begin(
    config: Config,
    *,
    ds_config: dict[str, object],
    found: Checkpoint | None,
    initial: Mapping[str, Tensor] | None,
    device: torch.device,
) -> tuple[Engine, Denoise | Classify]:
    """The engine and the objective where the run begins.

    The weights come from 1. the run's own checkpoint, 2. `--init`, 3. the seed.
    """
    determinism.apply(config.training.deterministic)
    torch.manual_seed(config.training.seed)
    net = build(config.model)
    if found is not None:
        file = found.file(WEIGHTS)
        weights.fill(net, weights.load(file), source=file)
    elif initial is not None:
        weights.fill(net, initial, source="--init")
    compute.prepare(net, training=config.training, device=device)
    engine = agreed(lambda: Engine(net, config=config, ds_config=ds_config, device=device))
    objective = build_objective(config)
    if found is not None:
        for kind in engine.kinds[1:]:
            with safe_open(found.file(kind), framework="pt") as tensors:
                engine.scatter(kind, tensors.get_tensor)
        found.state.restore(engine=engine, timesteps=objective.timesteps)
    return engine, objective


def remarks(
    config: Config, changes: Mapping[str, tuple[Any, Any]], shards: Shards, *, ranks: int
) -> list[str]:
    """What the log says of the config, and its `changes` of the run, before the run begins."""
    changed = [f"{name} changes from {a!r} to {b!r}" for name, (a, b) in changes.items()]
    odd = (
        averages.stated(config.training),
        classes.untrained(config, shards),
        crop_remark(shards, config=config.data),
        config.training.badly_cut_on(ranks),
    )
    said = compute.remarks(config.training) + compile_locks()
    return [*changed, *said, *(line for line in odd if line)]


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
        label_dropout=config.training.label_dropout,
    )
