"""Precision x ZeRO stage x offload: each setting resumes from the state of each, on two ranks.

    python -m tests.support.resuming     all 324 pairs, as a table

A state is loaded exactly when it is gathered again bit for bit; the step that follows must have the
loss that the setting which saved it has, as far as the precision goes.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import ranks
from tests.support.runs import STAGES, UNJUDGED, Place

SETTINGS = list(product(("fp32", "bf16", "fp16"), STAGES, (False, True)))
# Few of them, among which each two precisions, stages and kinds of offload are a pair.
FEW = SETTINGS[0::7] + SETTINGS[5::7]
SIZES = (
    "training.batch = 4",
    "training.images = 40",
    "training.micro_batch = 2",
    "training.warmup_images = 0",
)
# How well losses of the same weights agree, relative, in the coarser of two precisions.
CLOSE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}


@dataclass
class Saved:
    """What a setting has saved after two steps, and the loss of its third."""

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, Any]
    loss: float


def build(preset: Path, setting: tuple[str, int, bool], *, device: torch.device) -> Any:
    """An engine under a setting, from the seed."""
    import torch.distributed as dist

    from trainer.adm.unet import build as build_net
    from trainer.config import ds_config as ds_configs
    from trainer.config import experiment as configs
    from trainer.engine.zero import Engine

    precision, stage, offload = setting
    config = configs.load(preset, [*SIZES, f'training.precision = "{precision}"'])
    raw = json.loads((ranks.ROOT / "ds_config.json").read_text())
    raw["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    raw["fp16"]["loss_scale"] = 128
    if offload:
        raw["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    torch.manual_seed(0)
    net = build_net(config.model)
    start = net.state_dict() if dist.get_rank() == 0 else None
    resolved = ds_configs.resolve(raw, config=config, ranks=dist.get_world_size())
    return Engine(net, config=config, ds_config=resolved, device=device, start=start)


def step(engine: Any, number: int) -> float:
    """Step `number` on inputs that depend on it alone; the mean loss of all ranks."""
    import torch.distributed as dist

    seeded = torch.Generator().manual_seed(100 * number + dist.get_rank())
    images = torch.randn(2, 3, 8, 8, generator=seeded)
    output = engine(images, t=torch.full((2,), 100.0), y=torch.ones(2, dtype=torch.int64))
    loss = (output[:, :3].float() - images).square().mean()
    engine.backward(loss)
    engine.step(lr=1e-3, images_seen=4 * number, **UNJUDGED)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def resume_all(directory: Path, preset: Path, settings: list[tuple[str, int, bool]]) -> int:
    """Save under each setting, then resume each from each; rank 0 reports."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from trainer.ranks.process_group import connected
    from trainer.ranks.world import join

    CPU_Accelerator.is_fp16_supported = lambda self: True
    world = join()
    saved, found = {}, []
    with connected(world, patience=ranks.LIMIT) as device:
        engines = {setting: build(preset, setting, device=device) for setting in settings}
        for setting, engine in engines.items():
            for number in range(2):
                step(engine, number)
            tensors = {kind: engine.gather(kind) for kind in engine.kinds}
            saved[setting] = Saved(tensors, engine.scalars(), step(engine, 2))
        for setting, source in product(settings, settings):
            exact, loss = resume(engines[setting], saved[source])
            away = abs(loss - saved[source].loss) / saved[source].loss
            found.append((setting, source, exact, away))
    if world.is_main:
        (directory / "found.json").write_text(json.dumps(found))
    return 0


def resume(engine: Any, saved: Saved) -> tuple[bool, float]:
    """Load a state: whether it is gathered again bit for bit, and the loss of the next step."""
    for kind, tensors in saved.tensors.items():
        engine.scatter(kind, tensors.__getitem__)
    engine.load_scalars(saved.scalars)
    with engine.weights(engine.kinds[1]):
        pass  # the network's own copy is made again; a start has it from the weights
    exact = all(
        torch.equal(value, saved.tensors[kind][name])
        for kind in engine.kinds
        for name, value in engine.gather(kind).items()
    )
    return exact, step(engine, 2)


def table(
    root: Path, preset: Path, settings: list[tuple[str, int, bool]]
) -> list[tuple[Any, Any, bool, float]]:
    """Resume on two real ranks; setting, source, exactness and the loss's relative distance."""
    job = ranks.fork(root, partial(resume_all, root, preset, settings), ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0, 0], job.text
    rows: list[tuple[Any, Any, bool, float]] = json.loads((root / "found.json").read_text())
    return rows


def tolerance(setting: tuple[str, int, bool], source: tuple[str, int, bool]) -> float:
    return max(CLOSE[setting[0]], CLOSE[source[0]])


def main() -> int:
    """Run `python -m tests.support.resuming`; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m tests.support.resuming", description=__doc__
    ).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place.of_digits(Path(scratch))
        rows = table(place.root, place.preset, SETTINGS)
    worst: dict[tuple[str, str], tuple[int, float]] = {}
    for setting, source, exact, away in rows:
        assert exact and away < tolerance(setting, source), (setting, source, exact, away)
        count, largest = worst.get((source[0], setting[0]), (0, 0.0))
        worst[source[0], setting[0]] = count + 1, max(largest, away)
    print(f"{len(rows)} pairs of (precision, stage, offload): each state is loaded bit for bit")
    print("saved in  resumed in  pairs  loss of the next step differs at most by")
    for (source, setting), (count, largest) in worst.items():
        print(f"{source:9} {setting:11} {count:5}  {largest:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
