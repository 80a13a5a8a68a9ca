"""Costs counted in advance are those of real steps: DeepSpeed's collectives, and live tensors."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import ranks
from tests.support.runs import STAGES, UNJUDGED
from trainer.adm.unet import build, example_inputs
from trainer.config import ds_config
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine import shortcuts
from trainer.planning import costs

pytestmark = pytest.mark.slow

# ZeRO stage, precision, micro-batches of a step, whether buckets are reduced to all ranks.
Case = tuple[int, str, int, bool]
CASES: list[Case] = [
    *((stage, "bf16", 2, True) for stage in STAGES),
    (2, "fp32", 1, True),
    (1, "bf16", 2, False),
]
MICRO_BATCH = 4
OPS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_": "reduce",
}


class Observed(TorchDispatchMode):
    """Bytes of tensors that are alive, the most of them, and bytes that collectives take."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._born(value.untyped_storage())
        if func.namespace == "c10d":
            values = [v for v in pytree.tree_leaves(args) if isinstance(v, torch.Tensor)]
            name = OPS.get(func.__name__.partition(".")[0], func.__name__)
            size = max(v.nbytes for v in values)
            self.sent[name] = self.sent.get(name, 0) + size
            self.calls[name] = self.calls.get(name, 0) + (size > 1000)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._died, storage._cdata)

    def _died(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def settings(world: int, precision: str, accumulation: int) -> Config:
    batch = MICRO_BATCH * accumulation * world
    sizes = (f"training.batch = {batch}", f"training.images = {batch}")
    more = (f"training.micro_batch = {MICRO_BATCH}", f'training.precision = "{precision}"')
    return configs.load("digits", (*sizes, *more))


def zero(stage: int, to_all: bool) -> dict[str, Any]:
    section = ds_config.load(ranks.ROOT / "ds_config.json")["zero_optimization"]
    own = {"reduce_bucket_size": 1_000_000, "use_multi_rank_bucket_allreduce": to_all}
    return {**section, "stage": stage, **own}


class _AsOnAGpu(shortcuts.Buckets):
    """Buckets that have a buffer each, where they have on a GPU."""

    def __init__(self, optimizer: Any, *, aside: bool) -> None:
        super().__init__(optimizer, aside=not optimizer.reduce_scatter)


def measure(directory: Path) -> int:
    """Two steps of each case; what the second one sent, and the most that it held."""
    from trainer.engine.zero import Engine
    from trainer.ranks.process_group import connected
    from trainer.ranks.world import join

    shortcuts.Buckets = _AsOnAGpu  # type: ignore[misc]
    world = join()
    found = []
    with connected(world, patience=ranks.LIMIT) as device:
        for stage, precision, accumulation, to_all in CASES:
            config = settings(world.size, precision, accumulation)
            raw = ds_config.load(ranks.ROOT / "ds_config.json")
            raw["zero_optimization"] = zero(stage, to_all)
            resolved = ds_config.resolve(raw, config=config, ranks=world.size)
            with Observed() as observed:
                net = build(config.model)
                start = net.state_dict() if world.is_main else None
                engine = Engine(net, config=config, ds_config=resolved, device=device, start=start)
                del start
                for _ in range(2):
                    gc.collect()
                    observed.peak, observed.sent, observed.calls = observed.live, {}, {}
                    for _ in range(accumulation):
                        inputs = example_inputs(config.model, images=MICRO_BATCH)
                        inputs["y"].zero_()
                        loss = engine(inputs["x"].zero_(), inputs["t"].zero_(), inputs["y"]).mean()
                        engine.backward(loss)
                        del loss
                    engine.step(lr=1e-4, images_seen=config.training.batch, **UNJUDGED)
            found.append((observed.peak, observed.sent, observed.calls))
            del engine, net
            gc.collect()
    if world.is_main:
        (directory / "found.json").write_text(json.dumps(found))
    return 0


@pytest.fixture(scope="module", params=[2, 4])
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("costs")
    job = ranks.fork(directory, partial(measure, directory), ranks=request.param)
    job.wait()
    assert (directory / "found.json").exists(), job.text
    found = json.loads((directory / "found.json").read_text())
    return request.param, dict(zip(CASES, found, strict=True))


def test_the_bytes_between_ranks_are_those_that_deepspeed_sends(observed: Any) -> None:
    world, found = observed
    for case, (_, sent, _) in found.items():
        stage, precision, accumulation, to_all = case
        net = costs.count(settings(world, precision, accumulation))
        shape = {"zero": zero(stage, to_all), "ranks": world, "accumulation": accumulation}
        real = {name: size for name, size in sent.items() if size > 1000}
        wanted = {name: moved.size for name, moved in costs.collectives(net, **shape).items()}
        assert real == pytest.approx(wanted, rel=0.01), case


def test_the_collectives_of_a_step_are_those_that_deepspeed_calls(observed: Any) -> None:
    world, found = observed
    for case, (*_, called) in found.items():
        stage, precision, accumulation, to_all = case
        net = costs.count(settings(world, precision, accumulation))
        shape = {"zero": zero(stage, to_all), "ranks": world, "accumulation": accumulation}
        counted = {name: moved.calls for name, moved in costs.collectives(net, **shape).items()}
        if stage == 3:  # see `collectives`
            assert called.pop("all_gather") >= counted.pop("all_gather"), case
        real = {name: count for name, count in called.items() if count}
        assert real == pytest.approx(counted, abs=0 if to_all else 1), case


def test_the_memory_of_a_rank_is_what_a_step_holds(observed: Any) -> None:
    world, found = observed
    for (stage, precision, accumulation, to_all), (peak, *_) in found.items():
        config = settings(world, precision, accumulation)
        parts = costs.memory(
            costs.count(config),
            averages=len(config.training.ema),
            zero=zero(stage, to_all),
            ranks=world,
            micro_batch=MICRO_BATCH,
            accumulation=accumulation,
        )
        assert sum(parts.values()) == pytest.approx(peak, rel=0.10), (
            stage,
            precision,
            accumulation,
        )


@pytest.mark.parametrize(
    ("preset", "plain", "fused"),
    [("imagenet64", 374, 191), ("imagenet128", 1037, 463), ("imagenet256", 3936, 1691)],
)
def test_saved_activations_are_the_known_ones(preset: str, plain: int, fused: int) -> None:
    for kernels, megabytes in (("plain", plain), ("fused", fused)):
        config = configs.load(preset, (f'training.kernels = "{kernels}"',))
        assert costs.count(config).saved_bytes / 1e6 == pytest.approx(megabytes, rel=0.01)
