"""What a net and its diffusion process are: frozen dataclasses, checked as they are made.

Paper, sections 2 to 4 and appendix B; `trainer/presets/` has the published values. No torch here:
a login node checks a preset with nothing but Python installed.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

Conditioning = Literal["adagn", "add", "concat"]
QkvOrder = Literal["legacy", "new"]
Resample = Literal["biggan", "conv", "pool"]
Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]
Schedule = Literal["linear", "cosine"]
Predict = Literal["eps", "x0"]
Variance = Literal["learned", "fixed_large", "fixed_small"]
# How GroupNorm is computed: by torch, or in one operation with what follows it.
Kernels = Literal["plain", "fused"]
# Where a guidance is taken: x_t as published, or the mean of x_{t-1} as Algorithm 1 derives it.
GuideAt = Literal["x_t", "mean"]
Loss = Literal["hybrid", "hybrid_rescaled", "vlb", "vlb_rescaled", "simple"]

# The label of an image whose class the net is not told.
NO_LABEL = -1
# GroupNorm's, in every net of the paper.
GROUPS = 32
# Below, the last of the linear betas would be above 1.
_FEWEST_LINEAR_STEPS = 21


def check(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError, naming the setting, its value and what it must be, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {expected}")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise ValueError unless `value` is one of a Literal's."""
    known = get_args(choices)
    check(value in known, name, value, "one of " + ", ".join(f'"{choice}"' for choice in known))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the UNet and the classifier share. `attention` and `local_attention` are resolutions.

    Level i has int(channels * channel_mult[i]) channels and half the resolution of level i - 1.
    Attention at a resolution in `local_attention` sees windows of `local_window` squared.
    Give `heads` or `head_channels`, not both. The bottom of the net always has attention.
    """

    #: Height and width of the images.
    image_size: int
    #: The width that `channel_mult` multiplies.
    channels: int
    #: Width of each level; every level halves the resolution.
    channel_mult: tuple[float, ...]
    #: Residual blocks of a level (one more on the way up).
    blocks: int
    #: Resolutions of the maps with attention.
    attention: tuple[int, ...]
    #: Attention heads of every map.
    heads: int | None = None
    #: Channels of a head, in place of `heads`.
    head_channels: int | None = None
    #: The order of q, k and v in the published weights.
    qkv: QkvOrder = "legacy"
    #: "biggan": residual blocks resize; "conv": convolutions; "pool": neither learns.
    resample: Resample = "biggan"
    #: How timestep and class enter a block (paper, Table 3).
    conditioning: Conditioning = "adagn"
    #: Divide sums of residual blocks by sqrt(2) (paper, Table 1).
    rescale_residuals: bool = False
    #: Resolutions whose attention is local.
    local_attention: tuple[int, ...] = ()
    #: Side of its windows.
    local_window: int = 8
    #: Share of a residual block's activations.
    dropout: float = 0.0
    #: Recompute activations in the backward pass, for memory.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_choice("model.qkv", self.qkv, QkvOrder)
        check_choice("model.resample", self.resample, Resample)
        check_choice("model.conditioning", self.conditioning, Conditioning)
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and below 1")
        check(self.blocks >= 1, "model.blocks", self.blocks, "at least 1 per level")
        self._check_levels()
        self._check_attention()
        self._check_heads()

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, the largest maps first."""
        return tuple(int(self.channels * mult) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height and width of every level's maps."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @property
    def emb_channels(self) -> int:
        """Width of the embedding of timestep and class."""
        return 4 * self.channels

    def heads_at(self, channels: int) -> int:
        """Number of attention heads on a map of so many channels."""
        if self.head_channels is not None:
            return channels // self.head_channels
        assert self.heads is not None
        return self.heads

    def _check_levels(self) -> None:
        mult, size, levels = self.channel_mult, self.image_size, len(self.channel_mult)
        check(levels >= 1, "model.channel_mult", mult, "one multiplier for each level")
        check(
            size > 0 and size % (1 << (levels - 1)) == 0,
            "model.image_size",
            size,
            f"divisible by 2 for each of the {levels} levels of model.channel_mult",
        )
        even = self.channels > 0 and self.channels % 2 == 0
        check(even, "model.channels", self.channels, "a positive even number")
        widths = [self.channels * factor for factor in mult]
        check(
            all(width > 0 and width % GROUPS == 0 for width in widths),
            "model.channels",
            self.channels,
            f"such that with model.channel_mult = {mult} every level has a multiple of {GROUPS} "
            f"channels, as GroupNorm needs; they are {widths}",
        )

    def _check_attention(self) -> None:
        known = set(self.resolutions)
        check(
            set(self.attention) <= known,
            "model.attention",
            self.attention,
            f"among the net's resolutions {self.resolutions}",
        )
        check(
            set(self.local_attention) <= set(self.attention),
            "model.local_attention",
            self.local_attention,
            f"among model.attention = {self.attention}",
        )
        window = self.local_window
        check(
            window > 0 and all(size % window == 0 for size in self.local_attention),
            "model.local_window",
            window,
            f"a divisor of model.local_attention = {self.local_attention}",
        )

    def _check_heads(self) -> None:
        if (self.heads is None) == (self.head_channels is None):
            raise ValueError(
                f"model.heads = {self.heads}, model.head_channels = {self.head_channels}: "
                "one of the two must be given"
            )
        widths = {self.level_channels[-1]} | {
            width
            for width, resolution in zip(self.level_channels, self.resolutions, strict=True)
            if resolution in self.attention
        }
        for name in ("head_channels", "heads", "heads_up"):  # a classifier has no way up
            divisor = getattr(self, name, None)
            check(
                divisor is None or (divisor >= 1 and all(w % divisor == 0 for w in widths)),
                f"model.{name}",
                divisor,
                f"a divisor of the {sorted(widths)} channels of the maps with attention",
            )


@dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """A diffusion UNet; class-conditional with `num_classes`, an upsampler with `small_size`."""

    #: Heads on the way up. Absent: `heads`.
    heads_up: int | None = None
    #: Classes that it is conditioned on. Absent: none.
    num_classes: int | None = None
    #: Side of the images that an upsampler enlarges. Absent: it is none.
    small_size: int | None = None
    #: Follows from diffusion.variance.
    learn_sigma: bool = field(default=True, metadata={"follows": "diffusion.variance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.heads_up is None or self.heads is not None,
            "model.heads_up",
            self.heads_up,
            "absent where model.head_channels is given",
        )
        check(
            self.num_classes is None or self.num_classes >= 1,
            "model.num_classes",
            self.num_classes,
            "at least 1, or absent for no classes",
        )
        size, small = self.image_size, self.small_size
        check(
            small is None or (0 < small < size and size % small == 0),
            "model.small_size",
            small,
            f"a smaller divisor of model.image_size = {size}, or absent for no upsampler",
        )

    @property
    def in_channels(self) -> int:
        """Channels of the net's input: those of the enlarged low resolution come beside."""
        return 3 if self.small_size is None else 6

    @property
    def out_channels(self) -> int:
        """Channels of the net's output: prediction, and with `learn_sigma` the variance's."""
        return 6 if self.learn_sigma else 3


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(EncoderConfig):
    """A classifier of noised images: the encoder and a head that pools its features."""

    #: Classes that it tells apart.
    num_classes: int
    #: How the head pools the last map.
    pool: Pool = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.pool", self.pool, Pool)
        check(self.num_classes >= 2, "model.num_classes", self.num_classes, "at least 2")


#: The networks that a run may train.
NetworkConfig = UNetConfig | ClassifierConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noising process and what the net learns of it.

    `loss`: "simple" is the mean squared error; "hybrid" adds the variational term for the learned
    variance, in bits per dimension, with the mean detached ("hybrid_rescaled" times steps / 1000);
    "vlb" is that term alone, for the mean too ("vlb_rescaled" times steps).
    """

    #: Steps of the noising process, T.
    steps: int = 1000
    #: Its betas (paper, appendix B).
    schedule: Schedule
    #: What the net predicts: the noise, or the image.
    predict: Predict = "eps"
    #: Of a denoising step: learned per pixel, or one of its bounds.
    variance: Variance = "learned"
    #: See above.
    loss: Loss = "hybrid"

    def __post_init__(self) -> None:
        check_choice("diffusion.schedule", self.schedule, Schedule)
        check_choice("diffusion.predict", self.predict, Predict)
        check_choice("diffusion.variance", self.variance, Variance)
        check_choice("diffusion.loss", self.loss, Loss)
        fewest = _FEWEST_LINEAR_STEPS if self.schedule == "linear" else 2
        expected = f"at least {fewest} for a {self.schedule} schedule"
        check(self.steps >= fewest, "diffusion.steps", self.steps, expected)
        learned = self.variance == "learned"
        check(
            learned or not self.loss.startswith("hybrid"),
            "diffusion.loss",
            self.loss,
            f'"simple" or "vlb" where diffusion.variance = "{self.variance}" is not learned',
        )
        check(
            not learned or self.loss != "simple",
            "diffusion.loss",
            self.loss,
            'another where diffusion.variance = "learned", which "simple" leaves untrained',
        )
