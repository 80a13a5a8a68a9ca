"""guided-diffusion's own training code on our images, timesteps and noise, for `bench.follow`."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from bench import nets
from data.stream import Stream
from trainer import weights
from trainer.adm.config import ClassifierConfig, UNetConfig
from trainer.adm.objective import draw_noise, to_range
from trainer.adm.timesteps import UniformTimesteps
from trainer.config.experiment import Config

Weights = Mapping[str, Tensor]


@dataclass
class Training:
    """The loss of each step, and the last weights ("model") and averages ("ema-DECAY")."""

    losses: list[float]
    last: dict[str, Weights]


class Draws:
    """Ours in the place of guided-diffusion's images, timesteps and noise."""

    def __init__(self, stream: Stream, config: Config, *, steps: int) -> None:
        self.stream, self.batch, self.steps = stream, config.training.batch, steps
        self.seed = config.training.seed
        self.timesteps = UniformTimesteps(config.diffusion.steps, seed=self.seed)

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Images (B, 3, H, W) in [-1, 1] and their labels, a batch for each step."""
        for step in range(self.steps):
            batch = self.stream.load(range(step * self.batch, (step + 1) * self.batch))
            self.indices = batch.indices
            yield to_range(batch.images), {"y": batch.labels}

    def sample(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Their sampler of timesteps: those of the last batch (B,), and weights."""
        return self.timesteps.draw(self.indices)

    def noise(self, x: Tensor) -> Tensor:
        """The last batch's noise, as the images (B, 3, H, W)."""
        return draw_noise(x, self.indices, seed=self.seed)


def train(config: Config, draws: Draws, *, path: Path, start: Path, scratch: Path) -> Training:
    """Train by the code of a checkout of guided-diffusion, from the weights in `start`."""
    model = config.model
    if isinstance(model, UNetConfig):
        net = nets.guided_diffusion(model, path=path).module
    else:
        net = nets.guided_diffusion_classifier(model, path=path)
    net.load_state_dict(torch.load(start, weights_only=True))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        modules = "dist_util", "logger", "script_util", "train_util"
        device, logger, script, loops = (
            importlib.import_module(f"guided_diffusion.{module}") for module in modules
        )
        diffusion = script.create_gaussian_diffusion(
            steps=config.diffusion.steps,
            learn_sigma=isinstance(model, UNetConfig),
            noise_schedule=config.diffusion.schedule,
        )
        logger.configure(dir=str(scratch), format_strs=[])
        with patch.object(device, "dev", lambda: torch.device("cpu")):
            if isinstance(model, ClassifierConfig):
                losses = _classifier(net, diffusion, config, draws, path=path)
            else:
                losses = _loop(net, diffusion, config, draws, loops.TrainLoop)
    finally:
        dist.destroy_process_group()
    last = {"model": _last(scratch, "model")}
    if isinstance(model, UNetConfig):  # classifiers have no averages there
        last |= {f"ema-{decay}": _last(scratch, f"ema_{decay}_") for decay in config.training.ema}
    return Training(losses, last)


def _last(folder: Path, name: str) -> Weights:
    return weights.load(max(folder.glob(f"{name}*.pt")))


def _loop(net: Any, diffusion: Any, config: Config, draws: Draws, loop: Any) -> list[float]:
    """Train by `TrainLoop` until the batches end; returns the losses."""
    training, losses = config.training, []
    original = diffusion.training_losses

    def training_losses(net: Any, x: Tensor, t: Tensor, model_kwargs: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = original(net, x, t, model_kwargs, noise=draws.noise(x))
        losses.append(terms["loss"].mean().item())
        return terms

    diffusion.training_losses = training_losses
    made = loop(
        model=net,
        diffusion=diffusion,
        data=draws.batches(),
        batch_size=draws.batch,
        microbatch=-1,
        lr=training.lr,
        ema_rate=",".join(map(str, training.ema)),
        log_interval=draws.steps,
        save_interval=draws.steps,
        resume_checkpoint="",
        schedule_sampler=draws,
        weight_decay=training.weight_decay,
    )
    with suppress(StopIteration):
        made.run_loop()
    made.save()
    return losses


def _classifier(
    net: Any, diffusion: Any, config: Config, draws: Draws, *, path: Path
) -> list[float]:
    """Train by `classifier_train.py`; returns the losses."""
    sys.path.insert(0, str(path / "scripts"))
    script, training, losses = importlib.import_module("classifier_train"), config.training, []
    original = diffusion.q_sample
    diffusion.q_sample = lambda x, t: original(x, t, noise=draws.noise(x))
    words = {
        "iterations": draws.steps,
        "batch_size": draws.batch,
        "lr": training.lr,
        "weight_decay": training.weight_decay,
        "anneal_lr": training.anneal,
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    with (
        patch.object(sys, "argv", ["classifier_train.py", *flags]),
        patch.object(script.dist_util, "setup_dist", lambda: None),
        patch.object(script.logger, "configure", lambda: None),
        patch.multiple(
            script,
            create_classifier_and_diffusion=lambda **_: (net, diffusion),
            create_named_schedule_sampler=lambda *_: draws,
            load_data=lambda **_: draws.batches(),
            DDP=lambda net, **_: net,
            log_loss_dict=lambda _, t, terms: losses.append(terms["train_loss"].mean().item()),
        ),
    ):
        script.main()
    return losses
