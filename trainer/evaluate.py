"""Evaluate drawn images against a reference: FID, sFID, IS, precision, recall, KID.

  python -m trainer.evaluate SAMPLES... --reference R --network FILE    the figures of samples
  python -m trainer.evaluate reference SHARDS --out R.npz --network FILE   a reference file
  python -m trainer.evaluate nll RUN --data SHARDS                      bits per dimension
  python -m trainer.evaluate classifier RUN --data SHARDS               accuracy by quarter of t

SAMPLES are .npz files or directories of shards; `--plot FILE.png` shows those of a sweep. R is an
evaluator's .npz, a file made here, or images (shards or an .npz). On several ranks, as under
torchrun, each computes a share of the features.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import files
from data.exits import CommandParser
from trainer import common
from trainer.adm.config import check
from trainer.config.sections import FEWEST_SAMPLES
from trainer.evaluation import held_out, outputs, plots
from trainer.evaluation import reference as references
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.extraction import Extracted
from trainer.evaluation.features import FeatureNetwork, open_network
from trainer.evaluation.reference import Reference
from trainer.evaluation.results import Results, compare, table
from trainer.options import PATIENCE, add_local_rank
from trainer.ranks.context import RankContext
from trainer.ranks.ending import run_as_rank
from trainer.ranks.group import agreed, from_main
from trainer.ranks.process_group import connected
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join
from trainer.sampling.samplefile import Samples, open_samples


def _evaluator(arguments: argparse.Namespace, context: RankContext) -> Evaluator:
    """What computes features, with the `--network` and `--batch` of the command line."""
    agreed(lambda: check(arguments.batch >= 1, "--batch", arguments.batch, "at least 1"))
    return Evaluator(
        network=open_network(arguments.network, device=context.device),
        world=context.world,
        device=context.device,
        batch_size=arguments.batch,
        say=_say,
        clock=context.watchdog.clock,
    )


def _say(text: str) -> None:
    print(text, flush=True)


def evaluate(arguments: argparse.Namespace, *, context: RankContext) -> int:
    """Print the figures of all samples, and write them; returns the exit status."""
    agreed(lambda: _check_outputs(arguments))
    every = agreed(lambda: _open_all(arguments.samples))
    option, scales = "", [0.0] * len(every)
    if arguments.plot is not None:
        option, scales = agreed(lambda: plots.scales_of(every))
    evaluator = _evaluator(arguments, context)
    _check_earlier(arguments, evaluator, every)
    reference = evaluator.reference(arguments.reference, size=every[0].size)
    results = []
    for samples, out in zip(every, _outs(arguments), strict=True):
        found = evaluator.extract(samples, kept=range(samples.count))
        finish = partial(_finish, samples, found, reference, network=evaluator.network, out=out)
        results.append(from_main(finish))
    if context.world.is_main:
        # By scale where there are scales: a shell lists scale0.5 ahead of scale0, and 10 of 2.
        rows = sorted(zip(scales, every, results, strict=True), key=lambda row: row[0])
        _say(table({str(each.path): found for _, each, found in rows}))
    if (path := arguments.plot) is not None:
        of_scales = dict(zip(scales, results, strict=True))
        from_main(lambda: plots.sweep(path, of_scales, option=option, count=every[0].count))
        if context.world.is_main:
            _say(f"written: {path}")
    return 0


def _open_all(paths: Sequence[Path]) -> list[Samples]:
    """Open all samples; ValueError where one has too few, or their sizes differ."""
    every = [open_samples(path) for path in paths]
    for one in every:
        if one.count < FEWEST_SAMPLES:
            raise ValueError(
                f"{one.path} has {one.count} samples: must be at least {FEWEST_SAMPLES}"
            )
    for other in every[1:]:
        if other.size != every[0].size:
            raise ValueError(f"{every[0].path} and {other.path} have images of different sizes")
    return every


def _finish(
    samples: Samples,
    found: Extracted | None,
    reference: Reference | None,
    *,
    network: FeatureNetwork,
    out: Path,
) -> Results:
    """Compute, write and report the figures of one set of samples, on the main rank."""
    assert found is not None
    assert reference is not None
    about = {
        "samples": {
            "path": str(samples.path),
            "checksum": samples.checksum(),
            "count": samples.count,
            "drawn": samples.record,
        },
        "reference": {
            "path": reference.name,
            "checksum": reference.checksum,
            "count": reference.count,
        },
        "network": {"name": network.name, "sha256": network.sha256},
        "torch": torch.__version__,
    }
    _say(f"figures of {samples.path}")
    results = compare(
        found,
        reference,
        labels=None if samples.labels is None else samples.labels.tolist(),
        about=about,
        warnings=[network.warning] if network.warning else [],
        say=_say,
    )
    outputs.write(out, results.to_json())
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written: {out}")
    return results


def make_reference(arguments: argparse.Namespace, *, context: RankContext) -> int:
    """Write the reference file of a dataset; returns the exit status."""
    out, size = arguments.out, arguments.size
    agreed(lambda: check(size is None or size >= 1, "--size", size, "at least 1"))
    place = partial(outputs.check_place, suffix=".npz", kind="reference file that was made here")
    agreed(lambda: place(out, earlier=references.earlier(out)))
    samples = agreed(lambda: open_samples(arguments.shards, size=size))
    agreed(lambda: references.check_images(samples, size=samples.size))
    side = samples.size[0]
    expected = f"{side}, as the images are, or absent"
    agreed(lambda: check(size in (None, side), "--size", size, expected))
    evaluator = _evaluator(arguments, context)

    def check_same() -> None:
        if (earlier := references.earlier(out)) is not None:
            network = evaluator.network.sha256
            wanted = {"images_checksum": samples.checksum(), "network_sha256": network}
            outputs.check_same(out, earlier, wanted)

    from_main(check_same)
    found = evaluator.of_images(samples)

    def write() -> None:
        assert found is not None
        files.make_parent(out, option="--out")
        references.save(out, found, samples=samples, network=evaluator.network, say=_say)
        print(f"written: {out}: {found.count:,} images, {evaluator.network.name}")

    from_main(write)
    return 0


def _check_outputs(arguments: argparse.Namespace) -> None:
    count, out = len(arguments.samples), arguments.out
    check(out is None or count == 1, "--out", str(out), f"absent with {count} samples")
    outs = _outs(arguments)
    different = "of different names: the figures of each go beside it"
    check(len({*outs}) == len(outs), "SAMPLES", [*map(str, arguments.samples)], different)
    plots.check_plot(arguments.plot)
    for path in outs:
        outputs.check_place(path, suffix=".json", kind="evaluation", earlier=_earlier(path))


def _check_earlier(
    arguments: argparse.Namespace, evaluator: Evaluator, every: Sequence[Samples]
) -> None:
    """Raise Refused where an earlier result is of other samples, another reference or network."""
    samples_of = dict(zip(_outs(arguments), every, strict=True))
    there = from_main(lambda: [path for path in samples_of if path.exists()])
    if not there:
        return
    found = evaluator.check(arguments.reference, size=every[0].size)
    checksum = found.checksum if isinstance(found, Reference) else found.checksum()
    wanted = {"reference": checksum, "network": evaluator.network.sha256}

    def check_same() -> None:
        for path in there:
            wanted["samples"] = samples_of[path].checksum()
            outputs.check_same(path, _earlier(path), wanted)

    from_main(check_same)


def _earlier(path: Path) -> dict[str, Any] | None:
    """The checksums of the inputs of an earlier result; None where the file is no result."""
    about = (outputs.stored_json(path) or {}).get("about") or {}
    try:
        checksums = {name: about[name]["checksum"] for name in ("reference", "samples")}
        return {**checksums, "network": about["network"]["sha256"]}
    except (KeyError, TypeError):
        return None


def _outs(arguments: argparse.Namespace) -> list[Path]:
    """Where the figures are written: by default beside the samples."""
    if arguments.out is not None:
        return [arguments.out]
    # Not `with_suffix`: the scale in a name may have a point.
    return [
        samples.with_name(f"{samples.name.removesuffix('.npz')}.evaluation.json")
        for samples in arguments.samples
    ]


def parser() -> argparse.ArgumentParser:
    """The options of the figures."""
    p = CommandParser(prog="python -m trainer.evaluate", description=__doc__)
    samples = "sample files (.npz) or directories of shards"
    p.add_argument("samples", type=Path, nargs="+", help=samples)
    kinds = "statistics (.npz, also the ADM evaluator's), or images: shards or an .npz"
    p.add_argument("--reference", type=Path, required=True, help=kinds)
    out = "the .json to write (default: beside the samples, SAMPLES.evaluation.json)"
    p.add_argument("--out", type=Path, help=out)
    plot = "a picture of a sweep's figures against its scales (.png, .pdf or .svg; default: none)"
    p.add_argument("--plot", type=Path, metavar="FILE", help=plot)
    _add_common(p)
    return p


def reference_parser() -> argparse.ArgumentParser:
    """The options of a reference file."""
    about = "Make a reference file of a packed dataset."
    p = CommandParser(prog="python -m trainer.evaluate reference", description=about)
    p.add_argument("shards", type=Path, help="a directory of shards")
    p.add_argument("--out", type=Path, required=True, help="the .npz to write")
    size = "crop images that keep their own sizes to this (default: as packed)"
    p.add_argument("--size", type=int, help=size)
    _add_common(p)
    return p


def _add_common(p: argparse.ArgumentParser) -> None:
    network = (
        "what makes features: the Inception weights' file, a classifier's run, an exported .pt2, "
        "or dinov2:FILE.pt2"
    )
    p.add_argument("--network", required=True, help=network)
    p.add_argument("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    add_local_rank(p)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in held_out.COMMANDS:
        arguments, work = held_out.parser().parse_args(words), held_out.measure
    elif words and words[0] == "reference":
        arguments, work = reference_parser().parse_args(words[1:]), make_reference
    else:
        arguments, work = parser().parse_args(words), evaluate
    world = join()
    with (
        connected(world, patience=PATIENCE) as device,
        Watchdog(world, patience=PATIENCE, is_marked=False) as watchdog,
    ):
        common.check(common.command_facts(arguments))
        return work(arguments, context=RankContext(world=world, device=device, watchdog=watchdog))


if __name__ == "__main__":
    run_as_rank(main)
