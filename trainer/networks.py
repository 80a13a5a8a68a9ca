"""Trained networks by path: which weights a command line names, found, checked and loaded."""

import sys
import tomllib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data import files
from data.config import is_local, naming
from data.dataset import class_names
from trainer import diffusers_format, weights
from trainer.adm.config import check
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine import averages, caches, compute
from trainer.engine.compute import DTYPES
from trainer.ranks.group import agreed, broadcast, from_main
from trainer.run import checkpoint as checkpoints
from trainer.run.runstate import committed


@dataclass(frozen=True)
class TrainedNetwork:
    """A network and its weights file; found by the main rank alone, since a run may go on."""

    config: Config
    file: Path
    sha256: str
    #: Its name in messages.
    name: str
    #: Whether the config is the one that it was trained with, and not a preset's.
    has_own_config: bool = False

    @classmethod
    def find(
        cls,
        path: Path,
        *,
        preset: str | None = None,
        decay: float | None = None,
        option: str = "--preset",
        begun: Collection[str] = (),
    ) -> "TrainedNetwork":
        """The network at `path`: a run, a checkpoint, a weights file, or a folder of diffusers.

        Of a run it is the newest valid checkpoint, but one with a file whose checksum is in `begun`
        comes first. Where the path has no config of the network, `preset` gives it; `option` is the
        option for that. `decay` chooses the EMA, by default the first.

        Raises:
            ValueError: there is nothing of that kind at `path`, or it needs a preset.
        """
        name = str(path) if preset is None else f"{path} (preset {preset})"
        file = diffusers_format.find(path)
        is_run = file is None and not path.is_file()
        check(is_run or decay is None, "--ema", decay, "absent for a weights file")
        if not is_run:
            file = file or path
            config = _written_config(path, option) if preset is None else configs.load(preset)
            return cls(config, file, files.sha256(file), name, preset is None)
        files.check_link(path)
        if not path.is_dir():
            raise ValueError(f"no such run or weights file: {path}")
        found = _newest(path, begun=begun)
        own_config = run_of(found.path) / "config.toml"
        if preset is None and not own_config.is_file():
            raise ValueError(f"{path}: there is no {own_config}: add {option}")
        config = configs.load(own_config if preset is None else preset)
        average = averages.exponential(config.training.ema[0] if decay is None else decay)
        file = found.file(average)
        if file.name not in found.files:
            kept = (n.removesuffix(".safetensors") for n in found.files if n.startswith("ema-"))
            kinds = ", ".join(sorted(kept))
            raise ValueError(f"{found.path} has no {average}; it has: {kinds}")
        return cls(config, file, found.files[file.name]["sha256"], name, preset is None)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the file, by our names; ValueError as `trainer.weights.load`."""
        return diffusers_format.ours(weights.load(self.file), config=self.config.model)

    def check_weights(self) -> dict[str, Tensor]:
        """As `weights`; ValueError where they do not fit this network. Reads all of the file."""
        caches.check_made()
        found = self.weights()
        with torch.device("meta"):
            net = build(self.config.model)
        weights.check_fit(net.state_dict(), found, source=self.file)
        return found

    def net(
        self,
        *,
        device: torch.device,
        precision: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> nn.Module:
        """The network with its weights, on `device`, in the precision of its training or given.

        On a CPU the default is fp32. The main rank alone reads the file and sends the weights to
        the others. It may be compiled if `say` is given, which prints a line about that. All ranks
        must call it.

        Raises:
            ValueError: the file does not hold the weights of this network, or Triton is missing.
        """
        agreed(lambda: compute.check(self.config.training))
        own = "fp32" if device.type == "cpu" else self.config.training.precision
        with torch.device("meta"):
            net = build(self.config.model).to(DTYPES[precision or own])
        net.to_empty(device=device).eval().requires_grad_(False)
        from_main(lambda: weights.fill(net, self.weights(), source=self.file))
        for tensor in net.state_dict().values():
            broadcast(tensor)
        return compute.prepare(net, training=self.config.training, device=device, say=say)


def config_of(path: Path) -> Config | None:
    """The config with which the weights at `path` were trained, if they or their run have it."""
    with suppress(ValueError):
        if (path.parent / checkpoints.STATE).is_file():
            return configs.load(run_of(path.parent) / "config.toml")
        return _written_config(path, "--preset")
    return None


def names_of(config: Config) -> tuple[str, ...] | None:
    """The names of the classes that such a network has, if its shards are here; else None."""
    shards = config.data.shards
    if config.model.num_classes is None or not is_local(shards):
        return None
    with suppress(ValueError):
        return class_names(shards)
    return None


def _written_config(path: Path, option: str) -> Config:
    """The config in a folder of diffusers or a weights file, as `trainer.export` and runs write."""
    if path.is_dir():
        if path.name == "unet":
            raise ValueError(f"{path} is a part of a folder of diffusers: give {path.parent}")
        if not (path / "config.toml").is_file():
            raise ValueError(
                f"{path} has no config.toml, which trainer.export writes: add {option}"
            )
        return configs.load(path / "config.toml")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no run directory; for a weights file, add {option}")
    text = weights.metadata(path).get("config")
    if text is None:
        of = path.parent
        hint = f"give its checkpoint {of}, or add" if (of / checkpoints.STATE).is_file() else "add"
        raise ValueError(f"{path} does not say which network it is for: {hint} {option}")
    with naming(f"{path}: its config"):
        return configs.from_table(tomllib.loads(text))


def _newest(path: Path, *, begun: Collection[str]) -> checkpoints.Checkpoint:
    """The checkpoint at `path`, or a run's newest valid one, those with a file of `begun` first."""
    is_checkpoint = (path / checkpoints.STATE).is_file()
    files.check_link(path / "checkpoints")
    if not is_checkpoint and not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is no run and no checkpoint: give a directory with checkpoints/ in it, one of "
            "those in there, or a weights file"
        )
    places = [path] if is_checkpoint else committed(path / "checkpoints")
    ordered = sorted(places, key=lambda place: not _holds(place, begun))
    if ordered != places:
        print(
            f"goes on with {ordered[0]}, of which images are drawn already; another --out takes "
            "the newest checkpoint",
            file=sys.stderr,
        )
    for one in ordered:
        if (fault := checkpoints.fault_of(one)) is None:
            return checkpoints.read(one)
        print(f"skipped {one}: {fault}", file=sys.stderr)
    raise ValueError(f"{path} has no valid checkpoint")


def _holds(checkpoint: Path, wanted: Collection[str]) -> bool:
    """Whether a checkpoint has a file with one of these checksums; False if it is not readable."""
    with suppress(ValueError, OSError):
        found = checkpoints.read(checkpoint).files.values() if wanted else ()
        return any(facts["sha256"] in wanted for facts in found)
    return False


def run_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint, whose path may be a link or relative."""
    places = [path.parent.parent for path in (checkpoint.resolve(), checkpoint.absolute())]
    return next((run for run in places if (run / "config.toml").is_file()), places[-1])
