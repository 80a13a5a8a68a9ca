"""What a test puts into real ranks: spoiled losses, a flipped bit, and a count of waits."""

import json
import os
import pkgutil
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support import ranks
from tests.support.runs import Place


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """While entered, no file can grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def spoil(factors: Mapping[int, float]) -> None:
    """Multiply the losses of images, by index, in this process from now on."""
    from trainer.adm.objective import Denoise

    call: Callable[..., Any] = Denoise.__call__

    def spoiled(self: Denoise, net: Any, images: Any, labels: Any, indices: Any) -> Any:
        terms = call(self, net, images, labels, indices)
        factor = torch.tensor([factors.get(i, 1.0) for i in indices.tolist()]).to(terms["loss"])
        return terms | {"loss": terms["loss"] * factor}

    Denoise.__call__ = spoiled  # type: ignore[method-assign]


def spoil_the_first(images: Sequence[int], *, is_compiled: bool) -> None:
    """Let the first losses of these images not be numbers: those of the step, not of its replay.

    With `is_compiled` as if the step's network were a compiled one.
    """
    from trainer.adm.objective import Denoise
    from trainer.engine import compute

    compute.is_compiled = lambda *_, **__: is_compiled  # type: ignore[assignment]
    compute.compile_forward = lambda *_, **__: None  # type: ignore[assignment]
    call, left = Denoise.__call__, set(images)

    def spoiled(self: Denoise, net: Any, images: Any, labels: Any, indices: Any) -> Any:
        terms = call(self, net, images, labels, indices)
        bad = torch.tensor([i in left for i in indices.tolist()])
        left.difference_update(indices.tolist())
        return terms | {"loss": terms["loss"].masked_fill(bad, float("nan"))}

    Denoise.__call__ = spoiled  # type: ignore[method-assign]


def stop_at(clocks: Mapping[str, int]) -> None:
    """Stop runs, by name, in the step that ends at a clock; the ranks learn of it one later."""
    from trainer.loop import Loop

    step: Callable[..., None] = Loop._step

    def stopped(self: Loop, batches: Any) -> None:
        step(self, batches)
        if self.images_seen == clocks.get(self.run.path.name):
            self.stop_requested = lambda: True

    Loop._step = stopped  # type: ignore[method-assign]


def work(
    directory: Path,
    runs: list,
    factors: Mapping[int, float],
    fp16: bool,
    stops: Mapping[str, int] | None = None,
) -> int:
    """As `ranks.work`, with spoiled losses."""
    spoil(factors)
    stop_at(stops or {})
    return ranks.work(directory, runs, fp16)


def train(
    place: Place,
    *runs: list,
    world: int,
    factors: Mapping[int, float],
    fp16: bool = False,
    stops: Mapping[str, int] | None = None,
) -> list:
    """As `Place.train`, with spoiled losses, and stops of runs at a clock."""
    from functools import partial

    directory = place.root / f"spoiled-{len(list(place.root.glob('spoiled-*')))}"
    task = partial(work, directory, list(runs), factors, fp16, stops)
    job = ranks.fork(directory, task, ranks=world)
    job.wait()
    return job.statuses


def run_out_of_memory_in(name: str) -> None:
    """Let a function, as in "trainer.sampling.draw:draw", run out of memory in this process."""
    where, _, function = name.rpartition(":")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(f"in {name}")

    setattr(pkgutil.resolve_name(where), function, fail)


def be_killed_in(name: str) -> None:
    """Let this process be killed as it comes to a function, named as above."""
    where, _, function = name.rpartition(":")
    setattr(pkgutil.resolve_name(where), function, lambda *_, **__: os.kill(os.getpid(), 9))


def stop_in_a_grid(run: str, *, at: int) -> None:
    """Stop the run of that name as this process begins to draw the grid of a clock."""
    from trainer.measures import Measures

    draw: Callable[..., bool] = Measures._draw_grid

    def stopped(self: Measures, images_seen: int) -> bool:
        if (self.parts.run.path.name, images_seen) == (run, at):
            self.stop_requested = lambda: True
        return draw(self, images_seen)

    Measures._draw_grid = stopped  # type: ignore[method-assign]


def flip_a_bit(*, at: int) -> None:
    """Flip the lowest bit of one weight of this rank ahead of the audit at a clock."""
    from trainer.guards.audit import Audit

    check: Callable[..., Any] = Audit.check

    def flipped(self: Audit, images_seen: int, **named: Any) -> Any:
        if images_seen == at:
            parameter: Any = list(self.parts.engine._ds.module.parameters())[4]
            parts = hasattr(parameter, "ds_id")
            weights = parameter.ds_tensor if parts else parameter.data
            weights.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return check(self, images_seen, **named)

    Audit.check = flipped  # type: ignore[method-assign]


def fail_the_gpu(error: RuntimeError) -> None:
    """Let this rank's GPU be one that is shown and does not answer."""
    from trainer import allocation
    from trainer.ranks import process_group

    def device_of(*_: Any, **__: Any) -> torch.device:
        raise error

    allocation.device_of = process_group.device_of = device_of


def work_on_a_faulty_machine(
    directory: Path, runs: list, fault: Callable[[], None], rank: int
) -> int:
    """As `ranks.work`, with a fault on one of the ranks."""
    if os.environ["RANK"] == str(rank):
        fault()
    return ranks.work(directory, runs, False)


def note_waits(at: int) -> None:
    """Write how often the step at a clock waits for the device, to RUN/waits.json, in each run."""
    from trainer.loop import Loop

    step: Callable[..., None] = Loop._step
    whole, said = torch.cuda.synchronize, list[str]()
    torch.cuda.synchronize = lambda *given: (said.append("synchronize"), whole(*given))

    def noted(self: Loop, batches: Any) -> None:
        if self.images_seen != at:
            return step(self, batches)
        said.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(self, batches)
            torch.cuda.set_sync_debug_mode("default")
        texts = (str(each.message) for each in caught)
        said.extend(text for text in texts if "called a synchronizing" in text)
        (self.run.path / "waits.json").write_text(json.dumps(said))
        return None

    Loop._step = noted  # type: ignore[method-assign]
