"""Weights out: `python -m trainer.export RUN --to FILE.safetensors | FILE.pt | DIR/`.

A file holds weights (fp32, or `--precision`) under the published checkpoints' names, which
guided-diffusion loads (.pt) and which say of which network they are (.safetensors). A directory is
what diffusers loads, with a model card, our config and the run's last metrics. `trainer.sample` and
`--init` take any.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import files
from data.exits import CommandParser, path_text, reported
from trainer import diffusers_format, weights
from trainer.adm.config import ClassifierConfig, NetworkConfig, check
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.engine.compute import DTYPES
from trainer.networks import TrainedNetwork, run_of
from trainer.run import history

_CARD = """\
---
library_name: diffusers
---
# {name}

{parameters:,} parameters, {size} x {size} pixels, {classes}; trained as in "Diffusion Models Beat
GANs on Image Synthesis" (Dhariwal & Nichol 2021, arXiv:2105.05233). `config.toml` has every setting
of the training, `metrics.json` its last metrics. Weights: {source} (sha256 {sha256}).

{usage}

Classifier guidance is in the trainer alone (`python -m trainer.sample THIS_DIRECTORY ...`). Keep
`timestep_spacing="linspace"` of the DDPMScheduler. A DDIMScheduler takes three channels: cut
`conv_out` to its first three rows, and pass `use_clipped_model_output=True`.

## Licence

The weights carry the terms of the images that they were trained on (ImageNet: non-commercial
research), which whoever publishes them must state here.
"""
_CONDITIONAL = """\
Pipelines of DDPM take no class labels; the one for consistency models does:

```python
from diffusers import ConsistencyModelPipeline, DDPMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("THIS_DIRECTORY", subfolder="unet")
scheduler = DDPMScheduler.from_pretrained("THIS_DIRECTORY", subfolder="scheduler")
pipeline = ConsistencyModelPipeline(unet, scheduler)
images = pipeline(batch_size=4, class_labels={labels}, num_inference_steps=250).images
```"""
_UNCONDITIONAL = """\
```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("THIS_DIRECTORY")
images = pipeline(batch_size=4, num_inference_steps=250).images
```"""
_UPSAMPLER = """\
An upsampler: the input of `unet` is the noised image and beside it, as three more channels, the
low-resolution image enlarged by `interpolate(mode="bilinear")`. No pipeline does that."""


def export(arguments: argparse.Namespace) -> int:
    """Write what the command line asks for, or raise ValueError; returns the exit status."""
    target = str(arguments.to)
    found = TrainedNetwork.find(arguments.source, preset=arguments.preset, decay=arguments.ema)
    to = Path(target)
    check(not os.path.lexists(to), "--to", target, "a name that does not exist yet")
    kinds = target.endswith("/") or to.suffix in (".safetensors", ".pt")
    check(kinds, "--to", target, "FILE.safetensors, FILE.pt, or a directory, which ends in /")
    if target.endswith("/"):
        diffusers_format.assert_expressible(found.config.model)
    dtype = DTYPES[arguments.precision]
    read = found.check_weights()
    weights.check_finite(read, source=found.file)
    named = {n: value.to(dtype).contiguous() for n, value in read.items()}
    hint = f" in {arguments.precision}: give --precision bf16 or fp32"
    weights.check_finite(named, source=found.file, hint=hint)
    files.make_parent(to, option="--to")
    if to.suffix == ".safetensors":
        metadata = {"kind": found.file.stem, "config": configs.to_toml(found.config)}
        weights.save(to, named, metadata=metadata)
    elif to.suffix == ".pt":
        _write_pt(to, named)
    else:
        _write_folder(to, named, found=found)
    print(f"written: {to}: {found.file} ({arguments.precision})")
    if to.suffix == ".pt" and (remark := _class_remark(found.config.model)):
        print(remark)
    return 0


def _class_remark(model: NetworkConfig) -> str:
    """What guided-diffusion's code must say to load a network of so many classes; "" if it does."""
    if model.num_classes in (None, 1000):
        return ""
    names = f"NUM_CLASSES = {model.num_classes}"
    if isinstance(model, ClassifierConfig):
        names += f" and, in create_classifier, out_channels={model.num_classes}"
    return (
        "guided-diffusion has 1,000 classes in its code: before it loads this file, write "
        f"{names} in its guided_diffusion/script_util.py"
    )


def _write_pt(to: Path, named: Mapping[str, Tensor]) -> None:
    """Write a .pt file, which guided-diffusion loads."""
    with files.whole(to) as stream:
        try:
            torch.save(named, stream)
        except RuntimeError as error:
            # After a full disk or Ctrl-C torch fails again as it closes its archive.
            raise error.__context__ or error from None


def _write_folder(to: Path, named: Mapping[str, Tensor], *, found: TrainedNetwork) -> None:
    """Write a directory that diffusers loads, in full or not at all."""
    config, model = found.config, found.config.unet
    aside = to.with_name(f"{to.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for part in ("unet", "scheduler"):
            (aside / part).mkdir(parents=True)
        _write_json(aside / "unet" / "config.json", diffusers_format.options(model))
        _write_json(
            aside / "scheduler" / "scheduler_config.json", diffusers_format.scheduler(config)
        )
        theirs = diffusers_format.to_diffusers(named, config=model)
        contiguous = {name: value.contiguous() for name, value in theirs.items()}
        weights.save(aside / diffusers_format.FILE, contiguous, metadata={"format": "pt"})
        if model.small_size is None:
            _write_json(aside / "model_index.json", _index(config))
        files.write(aside / "config.toml", configs.to_toml(config))
        files.write(aside / "README.md", _card(to, named, found=found))
        # The run that a checkpoint's file belongs to.
        metrics = history.read(run_of(found.file.parent))
        if metrics:
            _write_json(aside / "metrics.json", metrics[-1])
        for path in (*aside.rglob("*"), aside):
            files.sync(path)
        aside.rename(to)
        files.sync(to.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _index(config: Config) -> dict[str, Any]:
    conditional = config.model.num_classes is not None
    return {
        "_class_name": "ConsistencyModelPipeline" if conditional else "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }


def _card(to: Path, named: Mapping[str, Tensor], *, found: TrainedNetwork) -> str:
    model = found.config.unet
    usage = _UNCONDITIONAL
    if model.num_classes is not None:
        labels = [i % model.num_classes for i in range(4)]
        usage = _CONDITIONAL.replace("{labels}", str(labels))
    classes = "no classes" if model.num_classes is None else f"{model.num_classes} classes"
    return _CARD.format(
        name=to.name,
        parameters=sum(value.numel() for value in named.values()),
        size=model.image_size,
        classes=classes,
        source=found.name,
        sha256=found.sha256,
        usage=usage if model.small_size is None else _UPSAMPLER,
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.export", description=__doc__)
    source = "a run, one of its checkpoints, or a weights file and --preset"
    p.add_argument("source", type=Path, help=source)
    to = "FILE.safetensors or FILE.pt (published names), or DIR/ for diffusers"
    p.add_argument("--to", required=True, type=path_text, help=to)
    p.add_argument(
        "--preset", help="the preset whose network a weights file holds (default: the run's own)"
    )
    ema = "which of the run's EMA decays (default: the first)"
    p.add_argument("--ema", type=float, help=ema)
    precision = "of the written weights (default: %(default)s)"
    p.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help=precision)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    return reported(lambda: export(arguments))


if __name__ == "__main__":
    sys.exit(main())
