"""The only door to DeepSpeed: one network, its ZeRO-sharded fp32 state, and one optimizer step.

`ds_config.json` holds the mechanics (stage, buckets, offload, loss-scale parameters); what the
preset owns is "auto" there and filled here. Checkpoints see the sharded state through `gather`
and `scatter`, by the network's own parameter names, whatever the stage and the world size.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator as it is imported, and warns at length where there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from trainer import ema
from trainer.config import Config
from trainer.partition import Part, Partition

#: Keys of ds_config.json that the preset decides.
_PRESET_OWNS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
_NOT_HERE = ("optimizer", "scheduler")

#: The names of gathered state: weights, Adam's two moments; one more per EMA decay.
WEIGHTS, FIRST_MOMENT, SECOND_MOMENT = "model", "adam-m", "adam-v"
_STATE_KEYS = {FIRST_MOMENT: "exp_avg", SECOND_MOMENT: "exp_avg_sq"}


def kinds(decays: Sequence[float]) -> tuple[str, ...]:
    """The kinds of fp32 state of a run with these EMA decays: each is a file of its checkpoints."""
    return (WEIGHTS, *map(ema.key, decays), FIRST_MOMENT, SECOND_MOMENT)


def load_mechanics(path: str | Path) -> dict[str, Any]:
    """Read ds_config.json.

    Raises:
        ValueError: it is unreadable, or sets what the preset owns (all such keys are named).
    """
    try:
        mechanics: dict[str, Any] = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the DeepSpeed config {path}: {error}") from None
    claimed = [name for name in _PRESET_OWNS if _lookup(mechanics, name) not in (None, "auto")]
    claimed += [name for name in _NOT_HERE if name in mechanics]
    if claimed:
        raise ValueError(
            f"{path} sets {', '.join(claimed)}, which the preset decides: "
            'write "auto" there (remove optimizer and scheduler), and set it in the preset'
        )
    stage = _lookup(mechanics, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage = {stage!r}: it must be 1, 2 or 3")
    _check_overflow_settings(mechanics, path=path)
    return mechanics


def _check_overflow_settings(mechanics: dict[str, Any], *, path: str | Path) -> None:
    """Refuse the settings under which a diverged run would train on."""
    if _lookup(mechanics, "bf16.check_grad_overflow") is False:
        raise ValueError(
            f"{path}: bf16.check_grad_overflow = false: it must be true, or absent: gradients that "
            "are not finite would enter the weights"
        )
    floor = _lookup(mechanics, "fp16.min_loss_scale")
    if floor is not None and not (isinstance(floor, int) and floor >= 1):
        raise ValueError(
            f"{path}: fp16.min_loss_scale = {floor!r}: it must be an integer of at least 1: "
            "without a floor the loss scale of a diverged run falls forever"
        )


def _lookup(table: dict[str, Any], name: str) -> Any:
    head, _, rest = name.partition(".")
    value = table.get(head)
    return _lookup(value, rest) if rest and isinstance(value, dict) else value


def resolve_mechanics(mechanics: dict[str, Any], *, config: Config, ranks: int) -> dict[str, Any]:
    """`mechanics` with every "auto" filled from the preset and the number of ranks."""
    training = config.training
    micro = training.micro_batch_on(ranks)
    owned = (
        training.batch,
        micro,
        training.batch // (ranks * micro),
        training.clip or 0.0,
        training.precision == "bf16",
        training.precision == "fp16",
    )
    resolved: dict[str, Any] = json.loads(json.dumps(mechanics))
    for name, value in zip(_PRESET_OWNS, owned, strict=True):
        head, _, rest = name.partition(".")
        if rest:
            resolved.setdefault(head, {})[rest] = value
        else:
            resolved[head] = value
    return resolved


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did, the same on all ranks; `grad_norm` is before clipping."""

    grad_norm: Tensor | float
    loss_scale: float
    skipped: bool
    #: Why the gradients are not finite and no later step can be expected to do better.
    diverged: str | None


class Engine:
    """A network under DeepSpeed-ZeRO.

    Call it as the network; `backward` each micro-batch's mean loss; `step` once per batch.
    `updates` counts the steps that were not skipped.
    """

    def __init__(
        self, net: nn.Module, *, config: Config, mechanics: dict[str, Any], device: torch.device
    ) -> None:
        # Of DeepSpeed's own calls; in stage 3 every micro-batch of every rank would show them.
        deprecated = ".*(all_gather_into_tensor|reduce_scatter_tensor)"
        warnings.filterwarnings("ignore", deprecated, category=FutureWarning)
        training = config.training
        self.device = device
        self.decays = training.ema
        self.kinds = kinds(training.ema)
        self.updates = 0
        self.skipped = 0
        # DeepSpeed casts the module to 16 bits and makes its fp32 masters from that copy; the
        # true fp32 start is put into the masters below.
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        self._count = sum(p.numel() for p in start.values())
        self._base = torch.optim.AdamW(
            net.parameters(),
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=device.type == "cuda",
        )
        self._ds, self._optimizer, _, _ = deepspeed.initialize(
            model=net.to(device), optimizer=self._base, config=mechanics, dist_init_required=False
        )
        self._growth = _Growth(self._optimizer.loss_scaler)
        self._names = dict(self._ds.module.named_parameters())
        self._fill_states()
        self._partition = Partition(
            [_place(number, p) for number, p in enumerate(self._names.values())],
            shapes={name: value.shape for name, value in start.items()},
            device=device,
        )
        ema.attach(self._base, decays=self.decays)
        for kind in (WEIGHTS, *(ema.key(d) for d in self.decays)):
            self.scatter(kind, start.__getitem__)

    def __call__(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        output: Tensor = self._ds(*inputs, **named)
        return output

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return self._count

    @property
    def stage(self) -> int:
        stage: int = self._ds.zero_optimization_stage()
        return stage

    @property
    def accumulation(self) -> int:
        steps: int = self._ds.gradient_accumulation_steps()
        return steps

    @property
    def micro_batch(self) -> int:
        size: int = self._ds.train_micro_batch_size_per_gpu()
        return size

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; a step averages over its micro-batches."""
        self._ds.backward(loss)
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()  # only counts the micro-batch

    def step(self, *, lr: float) -> StepReport:
        """Clip, update the weights and their averages; or skip the step.

        DeepSpeed skips a step whose gradients are not finite in every precision. That is normal
        only while a dynamic loss scale can still fall.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale, diverged = self.loss_scale, None
        try:
            self._ds.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            diverged = f"the gradients are not finite at the smallest loss scale, {scale:g}"
        skipped = bool(self._optimizer.overflow)
        if skipped and not self._optimizer.loss_scaler.dynamic:
            at = f" at the constant loss scale {scale:g}" if scale != 1 else ""
            diverged = f"the gradients are not finite{at}"
        if not skipped:
            self._growth.update()
        self.updates += not skipped
        self.skipped += skipped
        return StepReport(
            grad_norm=self._ds.get_global_grad_norm(),
            loss_scale=scale,
            skipped=skipped,
            diverged=diverged,
        )

    @property
    def loss_scale(self) -> float:
        return float(self._optimizer.loss_scale)

    def parameter_norm(self) -> float:
        """The L2 norm of all fp32 master weights. All ranks must call it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for partition in self._masters():
            total += partition.detach().double().square().sum()
        torch.distributed.all_reduce(total)
        return float(total.sqrt())

    def gather(self, kind: str, *, to: int | None = None) -> dict[str, Tensor]:
        """Every parameter's fp32 state of that kind, whole and on the host, by parameter name.

        `kind` is one of `kinds`. All ranks must call it; rank `to` alone gets the tensors, or every
        rank if it is None.
        """
        own = [_own_part(parameter, kind) for parameter in self._names.values()]
        return self._partition.gather(own, to=to)

    def scatter(self, kind: str, read: Callable[[str], Tensor]) -> None:
        """Set every parameter's fp32 state of that kind from `read(name)`, each rank its part."""
        for name, parameter in self._names.items():
            value = read(name).to(self.device, torch.float32)
            if hasattr(parameter, "ds_id"):
                _set_own_part(parameter, value, kind)
            elif kind == WEIGHTS:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, _state_key(kind))

    def scalars(self) -> dict[str, Any]:
        """The state that is not a tensor, for a checkpoint."""
        scaler = self._optimizer.loss_scaler
        names = _SCALER if scaler.dynamic else ()
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "scaler": {name: getattr(scaler, name) for name in names},
        }

    def load_scalars(self, state: dict[str, Any]) -> None:
        """Put back what `scalars` gave. A run that changed its precision starts a fresh scaler."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        for moments in self._base.state.values():
            moments["step"].fill_(float(self.updates))
        scaler = self._optimizer.loss_scaler
        if scaler.dynamic:
            for name, value in state["scaler"].items():
                setattr(scaler, name, value)

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 partitions of the weights."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        raise ValueError(
            f"DeepSpeed chose {type(self._optimizer).__name__} for this ds_config.json; "
            "remove data_types.grad_accum_dtype, or use ZeRO stage 2 or 3"
        )

    def _fill_states(self) -> None:
        """Make the optimizer's states now, as AdamW would at its first step, and the averages."""
        for partition in self._masters():
            # A fused AdamW counts its steps on the device.
            at = partition.device if self._base.defaults["fused"] else None
            self._base.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=at),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
                **{ema.key(decay): partition.detach().clone() for decay in self.decays},
            }
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _place(number: int, parameter: Any) -> Part:
    """Which numbers of a parameter this rank holds; all parts of ZeRO-3 but the last are full."""
    if hasattr(parameter, "ds_id"):
        size = parameter.ds_tensor.numel()
        start = min(torch.distributed.get_rank() * size, parameter.ds_numel)
        return Part(number, start, min(size, parameter.ds_numel - start))
    if parameter._hp_mapping is None:
        return Part(number, 0, 0)
    address = parameter._hp_mapping.lp_fragment_address
    return Part(number, address.start, address.numel)


def _own_part(parameter: Any, kind: str) -> Tensor:
    """The numbers that this rank holds of a parameter's state, flat."""
    if hasattr(parameter, "ds_id"):
        if kind == WEIGHTS:
            part = safe_get_local_fp32_param(parameter)
        else:
            part = safe_get_local_optimizer_state(parameter, _state_key(kind))
        return part[: _place(0, parameter).size]
    if parameter._hp_mapping is None:
        return torch.empty(0)
    key = None if kind == WEIGHTS else _state_key(kind)
    fragment: Tensor = parameter._hp_mapping.get_hp_fragment(key)
    return fragment.detach().flatten()


def _set_own_part(parameter: Any, value: Tensor, kind: str) -> None:
    """Set this rank's part of a parameter's state in ZeRO-3.

    DeepSpeed's setter of whole tensors fails where a parameter does not divide by the ranks. All
    parts are equally long, and DeepSpeed leaves the end of the last one uninitialized, which would
    count in norms: it is filled with zeros.
    """
    place = _place(0, parameter)
    part = value.flatten()[place.start : place.start + place.size]
    part = F.pad(part, (0, parameter.ds_tensor.numel() - place.size))
    if kind == WEIGHTS:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, _state_key(kind))


class _Growth:
    """Doubles a dynamic loss scale after a step that ended a window without overflow.

    DeepSpeed does that itself, but within the step and before it divides the gradients by the
    scale: one step in each window would take them, and in stage 3 report them, at half their size.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        if scaler.dynamic:
            self._window, scaler.scale_window = scaler.scale_window, sys.maxsize

    def update(self) -> None:
        """Called after every step that was not skipped."""
        scaler = self._scaler
        if not scaler.dynamic:
            return
        stable = scaler.cur_iter - 1 - scaler.last_overflow_iter
        if stable > 1 and (stable - 1) % self._window == 0:
            scaler.cur_scale *= scaler.scale_factor
            scaler.cur_hysteresis = scaler.delayed_shift


#: What a dynamic loss scaler remembers.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check_precision(precision: str) -> None:
    """Return if this machine computes in that precision.

    Raises:
        ValueError: it does not; names those that work.
    """
    accelerator = deepspeed.get_accelerator()
    supported = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
    }
    if not supported[precision]:
        others = " or ".join(f'"{name}"' for name, works in supported.items() if works)
        raise ValueError(
            f"training.precision = {precision!r} does not run on this device "
            f"({accelerator.device_name()}): set it to {others}"
        )


def _state_key(kind: str) -> str:
    return _STATE_KEYS.get(kind, kind)
