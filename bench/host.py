"""What the host does for a micro-batch and for a step, whatever the GPU: measured on a CPU.

    python -m bench.host [PRESET] [--guided-diffusion PATH] [--rounds 15]

The network: a preset's, at its fewest channels and pixels, so that computing takes little; what is
left of it falls away by a line through 32 and 64 channels to none. Eager, forward and backward,
ours and others in turn. Around it: loss, DeepSpeed and the step, with as many parameters as the
preset has, of eight numbers each. Thread's own CPU time; `bench.scale` predicts from the sum.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import nets
from trainer.adm.config import UNetConfig
from trainer.adm.objective import Denoise
from trainer.adm.timesteps import UniformTimesteps
from trainer.adm.unet import UNet
from trainer.config import ds_config
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine.zero import Engine
from trainer.ranks.process_group import connected
from trainer.ranks.world import join

CHANNELS = (32, 64)
#: Of the times of a part, the share below the one that counts: others disturb the rest.
QUANTILE = 25
Times = dict[str, list[float]]


class Operations(TorchDispatchMode):
    """Counts those that are no views."""

    total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = [r.alias_info for r in func._schema.returns]
        self.total += all(alias is None or alias.is_write for alias in results)
        return func(*args, **(kwargs or {}))


class Small(nn.Module):
    """As many parameters as a network has, and an output of its shape."""

    def __init__(self, count: int, out_channels: int) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.ones(8) for _ in range(count))
        self.out_channels = out_channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Noised images (B, 3, H, W) -> (B, out_channels, H, W)."""
        return torch.stack(list(self.all)).mean().expand(len(x), self.out_channels, *x.shape[2:])


def smallest(model: UNetConfig, *, channels: int) -> UNetConfig:
    """The network with the fewest pixels that keep its blocks, and so many channels."""
    # A norm needs more than one number in each group.
    size = (1 if min(model.channel_mult[-2:]) > 1 else 2) << (len(model.channel_mult) - 1)
    factor = model.image_size // size
    attention = tuple(resolution // factor for resolution in model.attention)
    return dataclasses.replace(
        model, image_size=size, attention=attention, channels=channels, head_channels=32
    )


def network(model: UNetConfig, *, path: Path | None, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each system's network."""
    found: dict[str, dict[int, Times]] = defaultdict(dict)
    counts: dict[str, dict[str, int]] = {}
    systems: dict[str, Callable[[UNetConfig], nets.Net]] = {"ours": nets.ours, **nets.others(path)}
    for channels in CHANNELS:
        config = smallest(model, channels=channels)
        made = {name: make(config) for name, make in systems.items()}
        for name, net in made.items():
            counts[name] = _operations(config, net)
            found[name][net.parameters] = defaultdict(list)
        for _ in range(rounds):
            for name, net in made.items():
                _pass(config, net, into=found[name][net.parameters])
    for name, by_size in found.items():
        yield {"part": f"network, {name}", **_without_numbers(by_size), **counts[name]}


def _operations(config: UNetConfig, net: nets.Net) -> dict[str, int]:
    with Operations() as forward:
        out = net.forward(*nets.inputs(config, images=1, device=torch.device("cpu")))
    with Operations() as backward:
        out.square().mean().backward()
    return {"operations forward": forward.total, "operations backward": backward.total}


def _pass(config: UNetConfig, net: nets.Net, *, into: Times) -> None:
    inputs = nets.inputs(config, images=1, device=torch.device("cpu"))
    net.module.zero_grad()
    began = time.thread_time()
    loss = net.forward(*inputs).square().mean()
    middle = time.thread_time()
    loss.backward()
    into["forward ms"].append(1e3 * (middle - began))
    into["backward ms"].append(1e3 * (time.thread_time() - middle))


def _without_numbers(by_size: dict[int, Times]) -> dict[str, float]:
    """The times of a network of no parameters, on the line through two sizes."""
    (few, small), (many, large) = sorted(by_size.items())
    return {
        name: max(
            0.0,
            _typical(small[name])
            - few * (_typical(large[name]) - _typical(small[name])) / (many - few),
        )
        for name in small
    }


def _typical(times: Sequence[float]) -> float:
    return float(np.percentile(times, QUANTILE))


def around(config: Config, *, stage: int, rounds: int) -> dict[str, Any]:
    """A row for what surrounds the network: loss and DeepSpeed's hooks, and the step."""
    model, training = config.model, config.training
    assert isinstance(model, UNetConfig)
    with torch.device("meta"):
        count = len(list(UNet(model).parameters()))
    raw = ds_config.load("ds_config.json")
    raw["zero_optimization"]["stage"] = stage
    world = join(expected_size=None)
    net, times = Small(count, model.out_channels), defaultdict[str, list[float]](list)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    with connected(world, patience=60) as device:
        resolved = ds_config.resolve(raw, config=config, ranks=world.size)
        engine = Engine(net, config=config, ds_config=resolved, device=device, start=start)
        timesteps = UniformTimesteps(config.diffusion.steps, seed=training.seed)
        objective = Denoise(config.diffusion, timesteps=timesteps, seed=0, class_conditional=True)
        images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        for n in range(1, rounds + 1):
            began = time.thread_time()
            terms = objective(engine, images, torch.zeros(1, dtype=torch.int64), torch.tensor([n]))
            middle = time.thread_time()
            engine.backward(loss := terms["loss"].mean())
            then = time.thread_time()
            engine.step(lr=1e-4, images_seen=n, loss=loss, judge=lambda *_: None)
            ends = (middle - began, then - middle, time.thread_time() - then)
            for name, seconds in zip(("forward ms", "backward ms", "step ms"), ends, strict=True):
                times[name].append(1e3 * seconds)
    return {
        "part": f"around it, ZeRO-{stage}, {count} parameters",
        **{name: _typical(each) for name, each in times.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.host`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    add = parser.add_argument
    add("preset", nargs="?", default="imagenet64", help="default: %(default)s")
    add("--guided-diffusion", type=Path, help="a checkout of it (default: left out)")
    add("--rounds", type=int, default=15, help="passes of each (default: %(default)s)")
    add("--stage", type=int, choices=(1, 2), default=2, help="of ZeRO (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = ("training.batch = 1", "training.micro_batch = 1", "training.images = 1000000")
    config = configs.load(options.preset, (*sizes, 'training.precision = "fp32"'))
    assert isinstance(config.model, UNetConfig), "a preset of images to draw"
    rows = [around(config, stage=options.stage, rounds=options.rounds)]
    rows += network(config.model, path=options.guided_diffusion, rounds=options.rounds)
    for row in rows:
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}))
    host = sum(rows[n][f"{name} ms"] for n in (0, 1) for name in ("forward", "backward"))
    print(f"a micro-batch: {host:.1f} ms of the host, a step {rows[0]['step ms']:.1f} ms more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
