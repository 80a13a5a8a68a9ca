"""The sections of an experiment that are the trainer's own: optimisation, and how often it reports.

No torch here: a login node checks a config before anything is queued.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from data.config import is_local, shown
from trainer.adm.config import Kernels, check

Precision = Literal["fp32", "bf16", "fp16"]
Timesteps = Literal["uniform", "loss-second-moment"]
Labelling = Literal["balanced", "random"]

# The fewest samples of which a fourth still has three neighbours for every one.
FEWEST_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation. All spans are counted in images, the one clock of a run."""

    #: Length of the run; a multiple of `batch`.
    images: int = field(metadata={"instead_of": ("steps", "max_steps", "iterations", "epochs")})
    #: Images of an optimizer step, over all ranks.
    batch: int
    #: At most this many images at once on a rank; gradient accumulation makes up the batch.
    micro_batch: int
    #: Learning rate of AdamW.
    lr: float
    #: Its decoupled decay.
    weight_decay: float = 0.0
    #: Its moments' decays.
    betas: tuple[float, float] = (0.9, 0.999)
    #: Raise the learning rate linearly from zero.
    warmup_images: int = 0
    #: Lower the learning rate linearly to zero at `images`.
    anneal: bool = False
    #: Largest global gradient norm; larger gradients are scaled down to it. Absent: no clipping.
    clip: float | None = None
    #: EMA decays; the first is the one that sample grids are drawn from.
    ema: tuple[float, ...]
    #: The images over which an average decays by that factor: with 0.5, its half-life. Absent: one
    #: step, so that another batch is another average.
    ema_images: int | None = None
    #: Until then a half-life is at most this share of the images seen. Absent: no warm-up, and the
    #: averages begin with the random start.
    ema_warmup: float | None = None
    #: Relative widths of power-function averages, of which `python -m trainer.ema` makes others.
    ema_widths: tuple[float, ...] = ()
    #: In what the net computes; weights are kept in fp32.
    precision: Precision
    #: "fused": norms in one operation, on a GPU; a CPU computes them as "plain".
    kernels: Kernels = "plain"
    #: Compile the forward and backward pass, on a GPU and below ZeRO-3. Dropout draws other masks.
    compile: bool = False
    #: Let fp32 products round their factors to 10 bits on a GPU, several times faster.
    tf32: bool = False
    #: How t is drawn; "loss-second-moment" draws it where losses are large.
    timesteps: Timesteps = "uniform"
    #: Share of images whose class the net is not told, for classifier-free guidance.
    label_dropout: float = 0.0
    #: Of weights, order, timesteps and noise.
    seed: int = 0
    #: On GPUs too, a resumed run is the uninterrupted one bit for bit (`engine.determinism`).
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "batch", "micro_batch"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        self._check(self.images < 10**12, "images", "below 10^12, which has more than 12 digits")
        divides = self.images % self.batch == 0
        self._check(divides, "images", f"a multiple of training.batch = {self.batch}")
        self._check(0 < self.lr < math.inf, "lr", "a number above 0")
        self._check(0 <= self.weight_decay < math.inf, "weight_decay", "a number from 0")
        clips = self.clip is None or 0 < self.clip < math.inf
        self._check(clips, "clip", "a number above 0, or absent")
        self._check(self.warmup_images >= 0, "warmup_images", "at least 0")
        self._check(0 <= self.label_dropout < 1, "label_dropout", "at least 0 and below 1")
        self._check(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1")
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        self._check(two, "betas", "two numbers in [0, 1)")
        differ = len(set(self.ema)) == len(self.ema) >= 1 and all(0 <= d < 1 for d in self.ema)
        self._check(differ, "ema", "one or more different decays in [0, 1)")
        self._check(self.ema_images is None or self.ema_images >= 1, "ema_images", "at least 1")
        self._check_averages()

    def _check_averages(self) -> None:
        share = self.ema_warmup
        self._check(share is None or 0 < share <= 1, "ema_warmup", "a share above 0 and at most 1")
        in_images = share is None or self.ema_images is not None
        self._check(in_images, "ema_warmup", "absent without training.ema_images")
        differ = len(set(self.ema_widths)) == len(self.ema_widths)
        narrow = all(0.005 <= width <= 0.28 for width in self.ema_widths)
        self._check(differ and narrow, "ema_widths", "different widths from 0.005 to 0.28")

    def _check(self, holds: bool, name: str, expected: str) -> None:
        check(holds, f"training.{name}", getattr(self, name), expected)

    def learning_rate(self, images_seen: int) -> float:
        """Of the step that starts at `images_seen`: linear warm-up, then linear anneal to 0."""
        rate = self.lr
        if self.warmup_images:
            rate *= min(1.0, (images_seen + self.batch) / self.warmup_images)
        if self.anneal:
            rate *= max(0.0, 1.0 - images_seen / self.images)
        return rate

    def micro_batch_on(self, ranks: int) -> int:
        """The largest even cut of a rank's share that is at most `micro_batch`.

        Raises:
            ValueError: the batch does not divide among `ranks`.
        """
        share, rest = divmod(self.batch, ranks)
        if rest:
            raise ValueError(
                f"training.batch = {self.batch} does not divide among {ranks} ranks: "
                "set training.batch to a multiple of the number of ranks, or start fewer"
            )
        return max(n for n in range(1, min(share, self.micro_batch) + 1) if share % n == 0)

    def badly_cut_on(self, ranks: int) -> str | None:
        """What to set where the batch is cut into micro-batches of less than half the limit."""
        share, micro = self.batch // ranks, self.micro_batch_on(ranks)
        if 2 * micro > min(share, self.micro_batch):
            return None
        steps = -(-share // self.micro_batch)
        near = [ranks * steps * (share // steps), ranks * steps * -(-share // steps)]
        return (
            f"training.batch = {self.batch} is cut into {share // micro} micro-batches of {micro} "
            f"on each of {ranks} ranks, though training.micro_batch = {self.micro_batch}: "
            f"{near[0]} or {near[1]} would be {steps} of up to {self.micro_batch}"
        )


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """How often things are done, in images."""

    #: Rows of metrics.
    log: int
    #: Checkpoints.
    checkpoint: int
    #: Save also so many minutes after the last checkpoint. Absent: by images alone.
    checkpoint_minutes: float | None = None
    #: The newest checkpoints that are kept.
    keep: int = 3
    #: The first checkpoint at or after each multiple of this stays. Absent: the newest alone stay.
    keep_every: int | None = None
    #: Minutes that a run trains on without being able to write a checkpoint.
    unsaved_minutes: float = 120.0
    #: Grids drawn from the EMA weights. Absent: none.
    samples: int | None = None
    #: Replays of a micro-batch on two ranks, which find faulty machines. Absent: none.
    audit: int | None = None
    #: Images of a grid.
    samples_count: int = 16
    #: How they are drawn, as `--steps` of sampling.
    samples_steps: str = "ddim25"
    #: Snapshots of the averages of training.ema_widths. Absent: none.
    averages: int | None = None
    #: The loss over data.validation. Absent: none.
    validate: int | None = None
    #: FID and the other figures of samples, as `[evaluation]` says. Absent: none.
    evaluate: int | None = None
    #: Keep the checkpoint with the smallest loss of validation, from the first EMA.
    keep_best: bool = False
    #: What snapshots are stored in.
    averages_precision: Literal["fp16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int:
                check(value >= 1, f"intervals.{name}", value, "at least 1")
        minutes = self.checkpoint_minutes
        check(minutes is None or minutes > 0, "intervals.checkpoint_minutes", minutes, "above 0")
        unsaved = self.unsaved_minutes
        check(unsaved >= 0, "intervals.unsaved_minutes", unsaved, "at least 0")
        # Every validation has a checkpoint, or the best one might have none.
        has_checkpoint = self.validate is not None and self.validate % self.checkpoint == 0
        multiple = "false unless intervals.validate is a multiple of intervals.checkpoint"
        check(has_checkpoint or not self.keep_best, "intervals.keep_best", True, multiple)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The samples of `intervals.evaluate`, from the first EMA, and what they are compared with."""

    #: As `--reference` of `python -m trainer.evaluate`.
    reference: str | None = None
    #: As its `--network`.
    network: str | None = None
    #: Images that are drawn. Figures' names carry this number: `fid_2k` is no `fid_50k`.
    images: int = 2000
    #: How they are drawn, as `--steps` of sampling.
    steps: str = "ddim25"
    #: Classes in turn, or each by a draw of its own, as for the paper's tables.
    labels: Labelling = "balanced"
    #: The factor of classifier-free guidance. Absent: none.
    cfg: float | None = None

    def __post_init__(self) -> None:
        least = f"at least {FEWEST_SAMPLES}"
        check(self.images >= FEWEST_SAMPLES, "evaluation.images", self.images, least)
        cfg = self.cfg
        known = cfg is None or 0 <= cfg < math.inf
        check(known, "evaluation.cfg", cfg, "a number from 0, or absent")
        for name, place in (("reference", self.reference), ("network", self.network)):
            here = place is None or is_local(place)
            check(here, f"evaluation.{name}", shown(place or ""), "a path on this machine")


@dataclass(frozen=True, kw_only=True)
class BoardConfig:
    """Where a run is shown beside TensorBoard."""

    #: A project of Weights & Biases. Absent: not shown there.
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about a step whose loss or gradient is not finite or far too large: skip it."""

    #: More deviations than this above its running mean, of logarithms, is a spike: of a gradient's
    #: norm, or of the loss with an unusual norm. inf: none is.
    spike: float = 10.0
    #: Steps that the running means cover; none is a spike before so many were taken.
    window: int = 128
    #: When so many in a row were skipped, the run goes back to its last good checkpoint.
    in_a_row: int = 8
    #: It does so at most so often, then it stops.
    rollbacks: int = 5

    def __post_init__(self) -> None:
        check(self.spike > 0, "guards.spike", self.spike, "above 0, or inf")
        for name, least in {"window": 2, "in_a_row": 1, "rollbacks": 0}.items():
            value = getattr(self, name)
            check(value >= least, f"guards.{name}", value, f"at least {least}")
