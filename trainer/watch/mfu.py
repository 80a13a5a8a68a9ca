"""Model FLOPs utilisation: the FLOP/s that training needs as a share of what the devices can do.

The network's FLOPs are counted from its shapes: three forward passes for an image, whatever is
computed again. They are held against matrix products measured here, on all ranks at once, and
against the device's datasheet.
"""

import re
import time
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from trainer.config.experiment import Config
from trainer.config.sections import Precision
from trainer.engine.compute import DTYPES
from trainer.planning import costs

# The dense 16-bit TFLOP/s of a device, with fp32 accumulation, by words of its name; the first that
# fits counts.
_DATASHEET = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "A6000": 155.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "T4": 65.0,
    "MI355X": 2500.0,
    "MI350X": 2300.0,
    "MI325X": 1307.0,
    "MI300X": 1307.0,
    "MI250X": 383.0,
}


@dataclass(frozen=True)
class Mfu:
    """What a training image needs, and what the devices of all ranks can do."""

    flops_per_image: float
    #: FLOP/s of all ranks together.
    measured: float
    #: The same by the datasheet; None for a CPU, fp32, or a device that is not known here.
    datasheet: float | None

    @classmethod
    def measure(cls, config: Config, *, device: torch.device) -> "Mfu":
        """Measure the devices of all ranks. All ranks must call it."""
        precision = config.training.precision
        dist.barrier()  # cores that ranks share are shared in training, too
        peak = torch.tensor(_matmul_peak(device, precision), dtype=torch.float64, device=device)
        dist.all_reduce(peak)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return cls.of(config, name=name, ranks=dist.get_world_size(), measured=float(peak))

    @classmethod
    def of(cls, config: Config, *, name: str, ranks: int, measured: float) -> "Mfu":
        """That of devices of a name whose matrix products reach `measured` FLOP/s together."""
        known = None if config.training.precision == "fp32" else datasheet(name)
        return cls(
            flops_per_image=3.0 * costs.count(config).forward_flops,
            measured=measured,
            datasheet=None if known is None else known * ranks,
        )

    def shares(self, images_per_second: float) -> dict[str, float]:
        """The utilisation at a rate of all ranks together, by name."""
        needed = self.flops_per_image * images_per_second
        shares = {"mfu_measured": needed / self.measured}
        if self.datasheet is not None:
            shares["mfu_datasheet"] = needed / self.datasheet
        return shares

    def __str__(self) -> str:
        sheet = "" if self.datasheet is None else f" (datasheet: {_short(self.datasheet / 1e12)})"
        return (
            f"{_short(self.flops_per_image / 1e9)} GFLOP to train on an image; matrix products "
            f"reach {_short(self.measured / 1e12)} TFLOP/s on all ranks{sheet}"
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def datasheet(name: str) -> float | None:
    """Dense 16-bit FLOP/s of the device of that name; None for one that is not known.

    A slice of a GPU, or the one of a laptop, has the name of what it has only a share of.
    """
    if re.search(r"\b(MIG|Laptop)\b", name):
        return None
    found = (1e12 * t for words, t in _DATASHEET.items() if re.search(rf"\b{words}\b", name))
    return next(found, None)


@cache
def _matmul_peak(device: torch.device, precision: Precision) -> float:
    """The FLOP/s of a large matrix product on this device: the best of some."""
    is_cuda = device.type == "cuda"
    size, times, turns = (8192, 10, 3) if is_cuda else (512, 1, 4)
    # Zeros would draw less power; the run's own random numbers stay as they are.
    random = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=random, device=device).to(DTYPES[precision])
    best = float("inf")
    for _ in range(turns):
        began = time.perf_counter()
        for _ in range(times):
            a @ a
        if is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / times)
    if is_cuda:
        del a
        torch.cuda.empty_cache()
    return 2.0 * size**3 / best
