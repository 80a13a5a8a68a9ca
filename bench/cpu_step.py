"""The training step on a CPU: ours against guided-diffusion's and diffusers' network, in one run.

    python -m bench.cpu_step [--guided-diffusion PATH] [--rounds 9] [--images 2]

One thread, fp32, a network of 18 million parameters at 64 pixels: forward pass, loss and backward
pass, not compiled; each in both layouts. The systems take turns in every round and the CPU's own
time is taken, so that other work on the machine slows all alike; what counts are the ratios of
medians. diffusers is compared where it is installed (`pip install diffusers`).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import nets
from bench.nets import Net
from trainer.adm.config import UNetConfig

CONFIG = UNetConfig(
    image_size=64, channels=64, channel_mult=(1, 2, 3, 4), blocks=1, attention=(32, 16, 8),
    head_channels=32, num_classes=1000, qkv="new",
)  # fmt: skip
#: How many times faster ours is meant to be.
AIMS = {"guided-diffusion": 1.3, "diffusers": 1.1}


def systems(guided_diffusion: Path | None) -> dict[str, Net]:
    """The networks to compare, ours first."""
    found = {"ours": nets.ours(CONFIG)}
    found["ours, channels first"] = nets.ours(CONFIG, layout=torch.contiguous_format)
    others = nets.others(guided_diffusion)
    found |= {name: make(CONFIG) for name, make in others.items()}
    for name, make in others.items():
        found[f"{name}, channels last"] = make(CONFIG)
        module: Any = found[f"{name}, channels last"].module  # stubs of `to` lack memory_format
        module.to(memory_format=torch.channels_last)
    return {name: nets.drawn(net) for name, net in found.items()}


def step(net: Net, *, images: int) -> float:
    """Seconds of the CPU for a forward and a backward pass."""
    inputs = nets.inputs(CONFIG, images=images, device=torch.device("cpu"))
    net.module.zero_grad()
    began = time.process_time()
    net.forward(*inputs).square().mean().backward()
    return time.process_time() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.cpu_step`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_step", description=__doc__)
    add = parser.add_argument
    add("--guided-diffusion", type=Path, help="a checkout of it (default: left out)")
    add("--rounds", type=int, default=9, help="steps of each system (default: %(default)s)")
    add("--images", type=int, default=2, help="images of a step (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = systems(options.guided_diffusion)
    times: dict[str, list[float]] = {name: [] for name in found}
    for count in range(options.rounds + 1):
        for name, net in found.items():
            seconds = step(net, images=options.images)
            if count:  # the first one warms up
                times[name].append(seconds)
    best = statistics.median(times["ours"])
    print(f"{'system':31} {'parameters':>12} {'s per step':>10} {'least':>7} {'ours is':>8}")
    for name, net in found.items():
        median = statistics.median(times[name])
        aim = f"  (meant: {AIMS[name]} x)" if name in AIMS else ""
        print(
            f"{name:31} {net.parameters:12,} {median:10.3f} {min(times[name]):7.3f} "
            f"{median / best:6.2f} x{aim}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
