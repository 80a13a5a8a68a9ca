"""A grid is drawn from averages that take the network's place, and needs no memory of its own."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import ranks
from tests.support.runs import STAGES, UNJUDGED
from trainer.adm.unet import build
from trainer.config import ds_config as ds_configs
from trainer.config import experiment as configs
from trainer.engine import averages
from trainer.engine.zero import WEIGHTS, Engine
from trainer.ranks.process_group import connected
from trainer.ranks.world import join
from trainer.sampling.draw import draw_grid

SETS = ["intervals.samples_count = 2", 'intervals.samples_steps = "ddim2"']


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process has had in memory since the last `reset`."""
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1])


def draw(root: Path, preset: Path) -> int:
    """Draw a grid from an average that is not the weights, and report what it took."""
    world, found = join(), {}
    # The last has some 35 MB of weights for images of 8x8, which take nothing.
    cases = [*((stage, []) for stage in STAGES), (2, ["model.channels = 160"])]
    with connected(world, patience=ranks.LIMIT) as device:
        for number, (stage, sets) in enumerate(cases):
            config = configs.load(preset, [*SETS, *sets])
            ds_config = ds_configs.load(ranks.ROOT / "ds_config.json")
            ds_config["zero_optimization"]["stage"] = stage
            ds_config = ds_configs.resolve(ds_config, config=config, ranks=world.size)
            net = build(config.model)
            start = net.state_dict() if world.is_main else None
            engine = Engine(net, config=config, ds_config=ds_config, device=device, start=start)
            del net, start
            shapes = {name: value.shape for name, value in engine.gather(WEIGHTS).items()}
            kind = averages.exponential(config.training.ema[0])
            reset()
            for _ in range(engine.accumulation):
                inputs = {"t": torch.ones(2), "y": torch.ones(2, dtype=torch.int64)}
                engine.backward(engine(torch.ones(2, 3, 8, 8), **inputs).square().mean())
            engine.step(lr=1e-3, images_seen=0, **UNJUDGED)
            step = peak()
            engine.scatter(kind, lambda name, shapes=shapes: torch.full(shapes[name], 0.01))
            with engine.weights() as whole:
                before = {name: value.clone() for name, value in whole.items()}
            reset()
            with engine.weights(kind) as averaged:
                draw_grid(
                    averaged, config=config, world=world, originals=None, on_step=lambda: None
                )
                swapped = all(bool((value == 0.01).all()) for value in averaged.values())
            grid = peak() - sum(4 * value.numel() for value in before.values())
            with engine.weights() as after:
                same = all(torch.equal(after[name], before[name]) for name in before)
            same &= all(bool((value == 0.01).all()) for value in engine.gather(kind).values())
            found[number] = swapped, same, (grid - step) / (4 * engine.parameter_count)
    (root / f"{world.rank}.json").write_text(json.dumps(found))
    return 0


@pytest.mark.slow
def test_a_grid_takes_no_more_than_a_step_and_leaves_the_weights(
    tmp_path: Path, tiny: Path
) -> None:
    job = ranks.fork(tmp_path, partial(draw, tmp_path, tiny), ranks=2)
    job.wait()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, (swapped, same, _) in found.items():
            assert swapped and same, (rank, case)
        *_, more = found.popitem()[1]
        assert more < 0.1, (rank, more)
