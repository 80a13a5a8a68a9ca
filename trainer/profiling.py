"""`--profile STEPS`: where the time of so many steps went, as a Chrome trace and a table.

The main rank alone is profiled, after steps that warm up. `RUN/profile/` gets a trace that Chrome,
Perfetto and TensorBoard's profiler plugin read, and `table.txt`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, schedule, tensorboard_trace_handler

from trainer.run.directory import Run

# Steps before the measurement: compilation and the choice of kernels, then the profiler's own.
_WAIT, _WARM_UP = 3, 2
# Kinds of work by parts of the names of kernels and operations; the first that fits counts.
_KINDS = {
    "communication": "nccl|c10d|gloo|allreduce|all_gather|reduce_scatter",
    "elementwise, compiled": "^triton_",
    "norm": "moments|group_gradients|channel_gradients|apply_gradient|group_norm|^apply$",
    "attention": "flash|fmha|attention|sdpa",
    "convolution": "conv|fprop|dgrad|wgrad",
    "optimizer": "adam|lerp|multi_tensor|foreach",
    "matrix products": "gemm|cutlass|nvjet|addmm|bmm|::mm|linear",
    "copies": "copy|memcpy|memset|::cat|clone|::to$|nchwToNhwc|nhwcToNchw",
}


def kind(name: str) -> str:
    """The kind of work, of `_KINDS`, that a kernel or operation of that name does."""
    for found, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return "other"


def table(times: Iterable[tuple[str, float]], *, seconds: float, steps: int) -> str:
    """A table of milliseconds per step by kind of work, with the idle time.

    `times` are (name, seconds) of what ran in `steps` steps, which took `seconds`.
    """
    sums: dict[str, float] = {}
    for name, spent in times:
        sums[kind(name)] = sums.get(kind(name), 0.0) + spent
    sums["idle"] = max(0.0, seconds - sum(sums.values()))
    rows = sorted(sums.items(), key=lambda row: -row[1])
    lines = [f"{'kind':22} {'ms per step':>12} {'share':>7}"]
    lines += [f"{k:22} {1e3 * s / steps:12.2f} {s / seconds:7.1%}" for k, s in rows]
    return "\n".join(lines) + "\n"


@contextmanager
def profiled(count: int, *, run: Run, is_main: bool) -> Iterator[Callable[[], None]]:
    """Profile `count` steps of a run on the main rank; yields what to call after each step."""
    if not count or not is_main:
        yield lambda: None
        return
    profiler = StepProfiler(count, run=run)
    yield profiler.step
    profiler.close()


class StepProfiler:
    """Profiles some steps of a run; `step` is called after each, and `close` after the last."""

    def __init__(self, steps: int, *, run: Run) -> None:
        self._steps, self._run, self._directory = steps, run, run.path / "profile"
        self._began = self._seconds = 0.0
        self._count = 0
        self._trace = tensorboard_trace_handler(str(self._directory))
        self._profile = profile(
            schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._keep,
        )
        self._profile.start()

    def step(self) -> None:
        """Count a step that has ended; after the last one, write the results."""
        self._count += 1
        if self._count > _WAIT + _WARM_UP + self._steps:
            return
        now = time.monotonic()
        if self._count == _WAIT + _WARM_UP:
            self._began = now
        # Up to here: what follows the last step, the profiler takes for itself.
        self._seconds = now - self._began
        self._profile.step()
        if self._count == _WAIT + _WARM_UP + self._steps:
            self._profile.stop()

    def close(self) -> None:
        """If the run ended before all steps were profiled, write what there is, and log it."""
        done, wanted = self._count - _WAIT - _WARM_UP, self._steps
        if done >= wanted:
            return
        self._steps = done
        self._profile.stop()
        self._run.log(
            f"--profile {wanted}: {max(done, 0)} steps were profiled: this start ended after "
            f"{self._count}, of which the first {_WAIT + _WARM_UP} are not"
        )

    def _keep(self, found: Any) -> None:
        self._run.attempt("profile/", lambda: self._write(found))
        self._run.settle()  # until it is written: afterwards the profiler's results are gone

    def _write(self, found: Any) -> None:
        if self._steps < 1:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self._trace(found)
        times = _times(found.key_averages(), of_device=torch.cuda.is_available())
        text = table(times, seconds=self._seconds, steps=self._steps)
        (self._directory / "table.txt").write_text(text)
        self._run.log(f"profiled {self._steps} steps: {self._directory}")


def _times(averages: Any, *, of_device: bool) -> list[tuple[str, float]]:
    """Names and seconds of the GPU's kernels, or without a GPU of operations on the CPU.

    Annotated ranges are left out: on a GPU their time is that of kernels, which are listed anyway.
    """
    if not of_device:
        operations = [a for a in averages if "ProfilerStep" not in a.key]
        return [(a.key, a.self_cpu_time_total / 1e6) for a in operations]
    kernels = [a for a in averages if a.device_type != DeviceType.CPU and not a.is_user_annotation]
    return [(a.key, a.self_device_time_total / 1e6) for a in kernels]
