"""The only module that imports DeepSpeed: one network, its ZeRO-sharded fp32 state, one step.

`ds_config.json` holds the mechanics (stage, buckets, offload, loss-scale parameters); what the
preset owns is "auto" there and filled here. Checkpoints see the sharded state through `gather`
and `scatter`, by the network's own parameter names, whatever the stage and the world size.
"""

import io
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator when it is imported, and warns where there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor, nn

from trainer.config.experiment import Config
from trainer.config.sections import TrainingConfig
from trainer.engine import averages, norms, operators, shortcuts
from trainer.engine.compute import DTYPES
from trainer.engine.copies import Copies
from trainer.engine.gate import Gate, Judge, LossScale, StepReport
from trainer.engine.partition import Partition
from trainer.ranks.faults import Refused
from trainer.ranks.group import all_come
from trainer.weights import MOMENTS, materialize

_REFUSALS = (ValueError, AssertionError, ImportError, DeepSpeedConfigError, ZeRORuntimeException)
WEIGHTS = "model"
# The keys of kinds of state in the optimizer; the averages' are the kinds themselves.
_STATE_KEYS = {WEIGHTS: None, **MOMENTS}


def kinds(training: TrainingConfig) -> tuple[str, ...]:
    """The kinds of fp32 state of a run: each is a file of its checkpoints."""
    return (WEIGHTS, *averages.kept(training), *MOMENTS)


class Engine:
    """A network, made on the meta device, under DeepSpeed-ZeRO.

    The main rank has the weights to `start` from, by name, and sends them to the others.
    Call it as the network; `backward` each micro-batch's mean loss; `step` once per batch.
    `updates` counts the steps that were not skipped.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        config: Config,
        ds_config: dict[str, Any],
        device: torch.device,
        start: Mapping[str, Tensor] | None,
    ) -> None:
        # Of DeepSpeed's own calls; in stage 3 every micro-batch of every rank would show them.
        deprecated = ".*(all_gather_into|reduce_scatter)_tensor"
        warnings.filterwarnings("ignore", deprecated, FutureWarning)
        training = config.training
        self.device = device
        self.averages = averages.kept(training)
        self.kinds = kinds(training)
        self.updates = self.skipped = 0
        #: The clock at the last update of the weights; 0 before the first.
        self.updated_at = 0
        #: Spans of the clock that rollbacks passed over, from the last update that counts.
        self.gaps: list[tuple[int, int]] = []
        # The clock after the step that is under way.
        self._now = 0
        self._shapes = {name: p.shape for name, p in net.named_parameters()}
        #: The network's parameters, in its own order, and how many numbers are learned.
        self.names = tuple(self._shapes)
        self.parameter_count = sum(shape.numel() for shape in self._shapes.values())
        materialize(net.to(DTYPES[training.precision]), start, device=device)
        self._base = torch.optim.AdamW(
            net.parameters(),
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._ds, self._optimizer = _initialize(net, self._base, ds_config, device=device)
        #: The ZeRO stage; images of a micro-batch, and micro-batches of a step on each rank.
        self.stage: int = self._ds.zero_optimization_stage()
        self.micro_batch: int = self._ds.train_micro_batch_size_per_gpu()
        self.accumulation: int = self._ds.gradient_accumulation_steps()
        self._masters()  # or DeepSpeed chose an optimizer without
        norms.install(self._optimizer, stage=self.stage)
        shortcuts.install(self._optimizer, stage=self.stage)
        self._scaling = LossScale(self._optimizer.loss_scaler)
        self._gate = Gate(self._optimizer, scaling=self._scaling)
        self._fill_states()
        parameters = dict(self._ds.module.named_parameters())
        self._partition = Partition(parameters, shapes=self._shapes)
        self._copies = Copies(self._optimizer, parameters)
        averages.attach(
            self._base, averages=self.averages, clock=lambda: (self.updated_at, self._now)
        )
        # DeepSpeed made the masters from the network's own copy, which may have 16 bits.
        self._partition.spread(start, keys=(None, *self.averages))

    def __call__(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        """The output of the network for inputs on its device, through DeepSpeed."""
        output: Tensor = self._ds(*inputs, **named)
        return output

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, a scalar; a step averages over them."""
        self._ds.backward(loss)
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()  # only counts the micro-batch

    def step(self, *, lr: float, images_seen: int, loss: Tensor, judge: Judge) -> StepReport:
        """Clip, update the weights and their averages; or skip the step.

        `images_seen` is the clock after this step, which the averages follow. `loss` is this rank's
        mean, and `judge` may refuse the step. One whose gradients are not finite is always skipped;
        that is no fault while a dynamic loss scale can still fall.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale, gate = self.loss_scale, self._gate
        self._now = images_seen
        gate.prepare(loss, judge)
        self._ds.step()
        skipped = bool(self._optimizer.overflow)
        if not skipped:
            self._scaling.update()
            self.updated_at = images_seen
        self.updates += not skipped
        self.skipped += skipped
        return StepReport(
            loss=gate.loss,
            grad_norm=gate.grad_norm,
            loss_scale=scale,
            skipped=skipped,
            fault=gate.fault,
        )

    @property
    def loss_scale(self) -> float:
        """The factor on the loss of the next step; 1 where the precision needs none."""
        return self._scaling.scale

    def parameter_norm(self) -> float:
        """The L2 norm of all fp32 master weights. All ranks must call it."""
        return norms.of_partitions(self._masters(), device=self.device)

    def gather(self, kind: str, *, to: int | None = None) -> dict[str, Tensor]:
        """Every parameter's fp32 state of that kind, whole and on the host, by parameter name.

        `kind` is one of `kinds`. All ranks must call it; rank `to` alone gets the tensors, or every
        rank if it is None.
        """
        return self._partition.gather(_STATE_KEYS.get(kind, kind), to=to)

    def scatter(self, kind: str, read: Callable[[str], Tensor]) -> None:
        """Set every parameter's fp32 state of that kind from `read(name)`, each rank its part."""
        for name in self._shapes:
            self._partition.set(name, _STATE_KEYS.get(kind, kind), read(name))

    @contextmanager
    def weights(self, kind: str = WEIGHTS) -> Iterator[dict[str, Tensor]]:
        """Weights or an average while entered: whole, on the device, in the training's precision.

        They take the place of the network's own, and no memory but for the gathered parts of stage
        3; nothing is trained meanwhile. All ranks must enter and leave together. An error ends the
        run: a rank that leaves by one waits for no other, and the network keeps what it has.
        """
        masters = self._masters()
        if kind != WEIGHTS:
            states = [self._base.state[master][kind] for master in masters]
            self._copies.make_from(masters, states)
        with self._copies.whole() as whole:
            yield whole
        if kind != WEIGHTS:
            self._copies.make(masters)

    def wrong_weights(self) -> dict[int, str]:
        """As `Partition.differing`, of the weights that the network computes with."""
        with self.weights() as weights:
            return self._partition.differing(weights)

    def renew(self, *, images_seen: int) -> None:
        """Compute from masters that `scatter` has changed; the averages count from this clock."""
        self._copies.make(self._masters())
        self.gaps.append((self.updated_at, images_seen))
        self.updated_at = images_seen

    def scalars(self) -> dict[str, Any]:
        """The state that is not a tensor, for a checkpoint."""
        for state in self._base.state.values():
            left_out = state.keys() - {"step", *MOMENTS.values(), *self.averages}
            assert not left_out, f"no checkpoint keeps the optimizer's {left_out}: see MOMENTS"
        return {
            "updates": self.updates,
            "updated_at": self.updated_at,
            "gaps": self.gaps,
            "skipped": self.skipped,
            "scaler": self._scaling.state(),
        }

    def load_scalars(self, state: dict[str, Any]) -> None:
        """Put back what `scalars` gave."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        # Runs of version 0.1 have averages per step alone, which need no clock.
        self.updated_at = state.get("updated_at", 0)
        self.gaps = [(before, after) for before, after in state.get("gaps", [])]
        for moments in self._base.state.values():
            moments["step"].fill_(float(self.updates))
        self._scaling.load(state["scaler"])

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 partitions of the weights."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        raise Refused("data_types.grad_accum_dtype needs ZeRO stage 2 or 3 (--ds-config)")

    def _fill_states(self) -> None:
        """Make the optimizer's states now, as AdamW would at its first step, and the averages."""
        for partition in self._masters():
            self._base.state[partition] = {
                # A fused AdamW counts its steps on the device.
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                **{key: torch.zeros_like(partition) for key in MOMENTS.values()},
                **{name: partition.detach().clone() for name in self.averages},
            }
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()


def load_operator(*, stopped: Callable[[], bool]) -> None:
    """Compile DeepSpeed's operator for CPUs, or load it, which may fail on one machine alone.

    DeepSpeed itself does it where the other ranks wait in the store, and hear nothing. A signal
    that has `stopped` this rank may have ended the compiler too: that is no error.

    Raises:
        OSError: it cannot be compiled, as without a compiler or room in TMPDIR, or loaded.
    """
    try:
        with redirect_stdout(io.StringIO()):  # it says so again, as it takes what is loaded
            if not stopped():
                build_shm_op()
    except (RuntimeError, ImportError, OSError) as error:
        if not stopped():
            raise operators.explained(error) from None


def _initialize(
    net: nn.Module, optimizer: torch.optim.Optimizer, ds: dict[str, Any], *, device: torch.device
) -> tuple[Any, Any]:
    """DeepSpeed's engine and its optimizer.

    Raises:
        Refused: on every rank, where it refuses the settings on all.
        ValueError: it refuses them here alone, or what they need cannot be imported here.
    """
    # DeepSpeed would take the GPU of this rank's number; Slurm may show each task only its own.
    where = Namespace(device_rank=device.index or 0)
    try:
        engine, wrapped, _, _ = deepspeed.initialize(
            where, model=net, optimizer=optimizer, config=ds, dist_init_required=False
        )
    except _REFUSALS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        kind = ValueError if isinstance(error, ImportError) or not all_come() else Refused
        if isinstance(error, UnicodeDecodeError):
            wrong = f"torch reads files of its own in the locale's encoding, {error.encoding}"
            raise kind(f"{wrong}: set PYTHONUTF8=1") from error
        raise kind(f"DeepSpeed refuses its settings (--ds-config): {said}") from error
    return engine, wrapped


def check_precision(precision: str) -> None:
    """Raise ValueError, naming those that work, unless this machine computes in that precision."""
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
