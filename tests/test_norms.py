"""The engine's norm, overflow and reductions are DeepSpeed's, bit for bit, in fewer operations.

And no step of it waits for the device by name, which must be the rank's own.
"""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import ranks
from tests.support.runs import STAGES, UNJUDGED
from trainer.config import ds_config
from trainer.config import experiment as configs
from trainer.config.experiment import Config

#: ZeRO stage, precision, clipping.
CASES = [*((s, p, 0.02) for s in STAGES for p in ("fp16", "bf16")), (2, "fp32", 0.02), (1, "bf16", None)]  # fmt: skip  # noqa: E501
#: The step in which a gradient of the last rank is infinite.
STEPS, INFINITE = 4, 1


class Count(TorchDispatchMode):
    """How many operations ran that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = [r.alias_info for r in func._schema.returns]
        if all(alias is None or alias.is_write for alias in results):
            self.total += 1
        return func(*args, **(kwargs or {}))


class Stream:
    """As a GPU's, where there is only one order."""

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class WithStreams:
    """Torch as `shortcuts` sees it on a GPU."""

    cuda = SimpleNamespace(
        is_available=lambda: True, current_stream=Stream, stream=lambda _: nullcontext()
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Quadratic(torch.nn.Module):
    """Many small parameters, and a loss with a gradient for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.ParameterList(torch.randn(n % 7 + 1, 5) for n in range(42))

    def forward(self, scale: Tensor) -> Tensor:
        return sum(((p.float() * scale).square().mean() for p in self.all), torch.zeros(()))


def settings(precision: str, clip: float | None) -> Config:
    clips = () if clip is None else (f"training.clip = {clip}",)
    sizes = ("training.batch = 4", "training.images = 4", "training.micro_batch = 1")
    return configs.load("digits", (*sizes, f'training.precision = "{precision}"', *clips))


def train(case: tuple, *, world: Any, device: torch.device) -> tuple[list[Any], list[Tensor], int]:
    """Reports of all steps, the final states, and the operations of the last step."""
    from trainer.engine.zero import Engine

    stage, precision, clip = case
    config = settings(precision, clip)
    raw = ds_config.load(ranks.ROOT / "ds_config.json")
    raw["fp16"]["initial_scale_power"] = 4
    # The larger of the parameters do not fit into a bucket of 30 numbers.
    bucket = 30 if precision == "fp32" else 400
    raw["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": bucket}
    resolved = ds_config.resolve(raw, config=config, ranks=world.size)
    net = Quadratic()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    engine = Engine(net, config=config, ds_config=resolved, device=device, start=start)
    reports = []
    for step in range(STEPS):
        last = world.rank == world.size - 1 and step == INFINITE
        for micro in range(engine.accumulation):
            scale = float("inf") if last and micro else 1.0 + world.rank + micro
            engine.backward(engine(torch.tensor(scale)))
        with Count() as count:
            report = engine.step(lr=1e-2, images_seen=4 * (step + 1), **UNJUDGED)
        reports.append([float(report.grad_norm), report.loss_scale, report.skipped])
    states = [value for kind in engine.kinds for value in engine.gather(kind).values()]
    for state in engine._base.state.values():  # as of another optimizer
        state["momentum_buffer"] = torch.zeros(1)
    with pytest.raises(AssertionError, match=r"no checkpoint keeps .*momentum_buffer"):
        engine.scalars()
    return reports, states, count.total


def compare(directory: Path) -> int:
    """All cases as DeepSpeed itself does them and as ours."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    from trainer.engine import norms, shortcuts
    from trainer.ranks.faults import Refused
    from trainer.ranks.process_group import connected
    from trainer.ranks.world import join

    # DeepSpeed refuses fp16 on most CPUs by this check alone.
    CPU_Accelerator.is_fp16_supported = lambda self: True
    waits, devices = [], set[int]()
    CPU_Accelerator.synchronize = lambda self, index=None: waits.append(index)
    CPU_Accelerator.set_device = lambda self, at: devices.add(getattr(at, "index", at) or 0)
    world, found = join(), []
    with connected(world, patience=ranks.LIMIT) as device:
        for case in CASES:
            with pytest.MonkeyPatch.context() as patched:
                for module, name in ((norms, "install"), (shortcuts, "install")):
                    patched.setattr(module, name, lambda *_, **__: None)
                theirs, states, slow = train(case, world=world, device=device)
            with pytest.MonkeyPatch.context() as patched:
                for module in (stage3, stage_1_and_2):  # put back what ours changes there
                    name = "count_used_parameters_in_backward"
                    patched.setattr(module, name, getattr(module, name))
                ours, own, fast = train(case, world=world, device=device)
                beside = _reduced_beside(patched, case, world=world, device=device)
            others = (own, beside) if case[0] < 3 else (own,)
            same = all(torch.equal(a, b) for o in others for a, b in zip(states, o, strict=True))
            found.append([theirs, ours, same, slow, fast])
        resolve = ds_config.resolve
        with pytest.MonkeyPatch.context() as patched:
            in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
            patched.setattr(ds_config, "resolve", lambda *a, **k: resolve(*a, **k) | in_fp32)
            with pytest.raises(Refused, match="grad_accum_dtype needs ZeRO stage 2 or 3"):
                train((1, "bf16", None), world=world, device=device)
    (directory / f"{world.rank}.json").write_text(json.dumps(found))
    (directory / f"device-{world.rank}.json").write_text(json.dumps([len(waits), list(devices)]))
    return 0


def _reduced_beside(patched: pytest.MonkeyPatch, case: tuple, **where: Any) -> list[Tensor]:
    """The final states where buckets are reduced as on a GPU, beside the backward pass."""
    from trainer.engine import shortcuts

    aside = shortcuts._reduce_aside

    def reduce_aside(optimizer: Any) -> None:
        optimizer.reduction_stream = Stream()
        aside(optimizer)

    patched.setattr(shortcuts, "torch", WithStreams())
    patched.setattr(shortcuts, "_reduce_aside", reduce_aside)
    return train(case, **where)[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("norms")
    job = ranks.fork(directory, partial(compare, directory), ranks=2)
    job.wait()
    assert (directory / "device-1.json").exists(), job.text
    return directory


@pytest.fixture(scope="module")
def compared(job: Path) -> list[Any]:
    found = [json.loads((job / f"{rank}.json").read_text()) for rank in (0, 1)]
    return [(case, *one) for rank in found for case, one in zip(CASES, rank, strict=True)]


def test_reports_and_states_are_deepspeed_s_own(compared: list[Any]) -> None:
    for case, theirs, ours, same, *_ in compared:
        assert ours == theirs and same, case
        assert [skipped for *_, skipped in ours] == [n == INFINITE for n in range(STEPS)], case


def test_the_operations_of_a_step_do_not_grow_with_the_parameters(compared: list[Any]) -> None:
    for case, *_, slow, fast in compared:
        # Stage 3 gathers every parameter after its step.
        assert fast < (80 if case[0] < 3 else slow), (case, slow, fast)


@pytest.mark.parametrize("rank", [0, 1])
def test_deepspeed_keeps_to_the_rank_s_device_and_does_not_wait_for_it(
    job: Path, rank: int
) -> None:
    """A rank's device is not of its number where the scheduler shows each rank its own."""
    waits, devices = json.loads((job / f"device-{rank}.json").read_text())
    assert (waits, devices) == (0, [0])
