"""What the command line of `trainer.sample` asks for, as jobs: one for each output.

A sweep over scales has a job for each scale, and with an upsampler each of them is followed by one
that enlarges its images. All is checked here, before anything is drawn.
"""

import argparse
import itertools
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data import files
from data.config import shown
from data.dataset import class_names
from trainer.classes import difference
from trainer.config.experiment import Config
from trainer.networks import TrainedNetwork
from trainer.sampling.draw import default_eta
from trainer.sampling.inputs import SampleInputs, trained_names
from trainer.sampling.labels import LOW_RES, Labels, choose
from trainer.sampling.npz_output import NpzOutput
from trainer.sampling.output import Output
from trainer.sampling.parts import DrawJob, SampleRequest
from trainer.sampling.samplefile import Samples, open_samples
from trainer.sampling.shard_output import ShardOutput

# How many images are drawn where nothing says how many.
_IMAGES = 100


def low_res_checksum(path: Path | None, *, inputs: SampleInputs) -> str | None:
    """The checksum of the images of `--low-res`; None without. Errors as `base_jobs`."""
    low_res = _open_low_res(path, source=inputs.denoiser)
    return None if low_res is None else low_res.checksum()


def base_jobs(
    arguments: argparse.Namespace,
    inputs: SampleInputs,
    *,
    low_res_checksum: str | None,
    device: torch.device,
) -> list[DrawJob]:
    """The jobs of the first network: one for each scale and each factor of `--cfg`.

    Raises:
        ValueError: a file, a class, or a combination that does not work.
    """
    source = inputs.denoiser
    low_res = _open_low_res(arguments.low_res, source=source)
    labels = choose(
        rule=arguments.labels,
        classes=arguments.classes,
        low_res=None if low_res is None else low_res.labels,
        count=inputs.classes,
        enlarges=low_res is not None,
        names=lambda: _names(inputs.labelled.config),
        seed=arguments.seed,
    )
    if low_res is not None:
        _check_names(low_res.classes, network=source)
    request = SampleRequest(
        images=_count(arguments.images, low_res=low_res, labels=labels),
        batch=arguments.batch,
        seed=arguments.seed,
        steps=arguments.steps,
        eta=default_eta(arguments.steps) if arguments.eta is None else arguments.eta,
        scale=0.0,
        guide_at=arguments.guide_at,
        cfg=None,
        labels=None if labels is None else labels.rule,
        classes=None if labels is None else labels.classes,
        pixels=arguments.pixels,
        precision=arguments.precision,
        device=device.type,
        noise=1 if low_res is None else 2,
        sources=tuple(s.sha256 for s in (source, inputs.classifier) if s is not None),
        low_res=low_res_checksum,
    )
    base = partial(_base_job, arguments, inputs, labels=labels, low_res=low_res)
    scales = arguments.scale or ((0.0,) if inputs.classifier is None else (1.0,))
    return [
        base(replace(request, scale=scale, cfg=cfg))
        for scale, cfg in itertools.product(scales, arguments.cfg or (None,))
    ]


def _base_job(
    arguments: argparse.Namespace,
    inputs: SampleInputs,
    request: SampleRequest,
    *,
    labels: Labels | None,
    low_res: Samples | None,
) -> DrawJob:
    """The job of one scale of the classifier and one factor of `--cfg`."""
    variant = f"-scale{request.scale:g}" if len(arguments.scale or ()) > 1 else ""
    variant += f"-cfg{request.cfg:g}" if len(arguments.cfg or ()) > 1 else ""
    end = variant if inputs.upsampler is None else f"{variant}-base"
    classes = _class_list(inputs.labelled.config, labels, low_res)
    return DrawJob(
        request=request,
        output=_output(arguments.out, end, request, source=inputs.denoiser, classes=classes),
        source=inputs.denoiser,
        classifier=inputs.classifier,
        labels=labels,
        classes=classes,
        low_res=low_res,
        variant=variant,
    )


def enlarging_job(
    base: DrawJob, *, upsampler: TrainedNetwork, arguments: argparse.Namespace
) -> DrawJob:
    """The job that enlarges what `base` draws; `with_low_res` completes it once that is there."""
    labels = None
    if (given := base.all_labels()) is not None:
        labels = Labels(rule=LOW_RES, given=given)
    steps = arguments.upsampler_steps or arguments.steps
    request = replace(
        base.request,
        batch=arguments.upsampler_batch or arguments.batch,
        steps=steps,
        eta=default_eta(steps) if arguments.eta is None else arguments.eta,
        scale=0.0,
        guide_at="x_t",
        cfg=None,
        labels=None if labels is None else labels.rule,
        classes=None,
        noise=2,
        sources=(upsampler.sha256,),
    )
    output = _output(arguments.out, base.variant, request, source=upsampler, classes=base.classes)
    output.unknown = ("low_res",)
    return replace(
        base,
        request=request,
        output=output,
        source=upsampler,
        classifier=None,
        labels=labels,
        low_res=None,
    )


def facts(jobs: Sequence[DrawJob]) -> dict[str, str]:
    """The outputs and requests of jobs as text by name, which all ranks must have in common."""
    each = [{"out": job.output.path, **vars(job.request)} for job in jobs]
    return {name: ", ".join(dict.fromkeys(str(one[name]) for one in each)) for name in each[0]}


def with_low_res(job: DrawJob, *, base: DrawJob, checksum: str) -> DrawJob:
    """An `enlarging_job` with its low-resolution images, which `base` has drawn by now."""
    request = replace(job.request, low_res=checksum)
    job.output.request, job.output.unknown = vars(request), ()
    return replace(job, request=request, low_res=open_samples(base.output.path))


def check_room(jobs: Sequence[DrawJob]) -> str:
    """The disk space needed and free, in words; ValueError if there is too little."""
    out = jobs[0].output.path
    directory = files.nearest(out.absolute().parent)
    free, needed = shutil.disk_usage(directory).free, sum(job.output.needed() for job in jobs)
    if free < needed:
        raise ValueError(
            f"{out} needs {_gib(needed)} and {_gib(free)} are free: name another --out"
        )
    return f"{_gib(needed)} to write, {_gib(free)} free"


def _gib(size: int) -> str:
    """A number of bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _open_low_res(path: Path | None, *, source: TrainedNetwork) -> Samples | None:
    """The images of `--low-res`, or none; ValueError unless they are what this network needs."""
    model = source.config.unet
    if path is None or model.small_size is None:  # neither is there, by `check_fit`
        return None
    try:
        samples = open_samples(path, size=model.image_size)
    except ValueError as error:
        raise ValueError(f"--low-res {error}") from None
    known = [(model.small_size, model.small_size), (model.image_size, model.image_size)]
    if samples.size not in known:
        height, width = samples.size
        raise ValueError(
            f"--low-res {path}: the images are {height} x {width}; they must be {known[0][0]} px, "
            f"or {known[1][0]} px to be reduced first"
        )
    return samples


def _check_names(theirs: Sequence[str] | None, *, network: TrainedNetwork) -> None:
    """Raise ValueError where the names of the images' classes differ from the network's."""
    if differs := difference(trained_names(network), theirs, named=network.name):
        shards = shlex.quote(shown(network.config.data.shards))
        raise ValueError(f"--low-res: {differs}: pack the images with --classes-of {shards}")


def _count(asked: int | None, *, low_res: Samples | None, labels: Labels | None) -> int:
    """How many images are drawn: by default all of --low-res or of a file of --labels."""
    limits = {"--low-res": low_res.count} if low_res is not None else {}
    if labels is not None and labels.given is not None and labels.rule != LOW_RES:
        limits["--labels"] = len(labels.given)
    for option, count in limits.items():
        if asked is not None and asked > count:
            raise ValueError(f"--images = {asked}: must be at most the {count} of {option}")
    return asked or min(limits.values(), default=_IMAGES)


def _output(
    out: str, end: str, request: SampleRequest, *, source: TrainedNetwork, classes: Sequence[str]
) -> Output:
    """Where the images of a request go: `--out`, with `end` after its name."""
    size, is_file = source.config.model.image_size, not out.endswith("/")
    path = Path(f"{out.removesuffix('.npz')}{end}.npz" if is_file else f"{out.rstrip('/')}{end}")
    files.check_name(path, option="--out")
    if is_file:
        return NpzOutput(path, size=size, request=vars(request))
    return ShardOutput(path, size=size, request=vars(request), classes=classes)


def _class_list(config: Config, labels: Labels | None, low_res: Samples | None) -> Sequence[str]:
    """The names of the classes: those of the enlarged images, of the training, or numbers."""
    if labels is None:
        return ()
    known = None if low_res is None else low_res.classes
    try:
        known = known or class_names(config.data.shards)
    except ValueError:
        known = ()
    largest = int(labels.given.max()) if labels.given is not None else max(labels.classes or (0,))
    count = max(config.model.num_classes or 0, largest + 1)
    return known if len(known) >= count else [str(i) for i in range(count)]


def _names(config: Config) -> Sequence[str]:
    try:
        return class_names(config.data.shards)
    except ValueError as error:
        raise ValueError(
            f"names of classes are in the manifest of data.shards, and {error}; write numbers, as "
            "`python -m data.shards info` prints them"
        ) from None
