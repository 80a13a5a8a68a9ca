"""`python -m trainer.sample RUN --out FILE.npz`: draw images from a run's EMA or a weights file."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from trainer import common
from trainer.ranks.context import RankContext
from trainer.ranks.ending import run_as_rank
from trainer.ranks.group import agreed, from_main
from trainer.ranks.process_group import connected
from trainer.ranks.signals import DRAWING, Preemption
from trainer.ranks.watchdog import Watchdog
from trainer.ranks.world import join
from trainer.sampling.drawing import Drawing
from trainer.sampling.inputs import SampleInputs
from trainer.sampling.jobstate import JobState, noted
from trainer.sampling.options import check_options, parser
from trainer.sampling.output import begun
from trainer.sampling.parts import DrawJob
from trainer.sampling.requests import (
    base_jobs,
    check_room,
    enlarging_job,
    facts,
    low_res_checksum,
    with_low_res,
)
from trainer.sampling.samplefile import open_samples


def sample(arguments: argparse.Namespace, *, context: RankContext, state: JobState) -> int:
    """Draw what was asked for; returns the exit status."""
    agreed(lambda: check_options(arguments))
    common.check(common.software())
    # Images that an earlier start has begun are drawn from the same checkpoint, if it is there.
    inputs = from_main(lambda: SampleInputs.find(arguments, begun=begun(arguments.out)))
    checksum = from_main(lambda: low_res_checksum(arguments.low_res, inputs=inputs))
    device = context.device
    jobs = agreed(lambda: base_jobs(arguments, inputs, low_res_checksum=checksum, device=device))
    later: list[DrawJob] = []
    if (upsampler := inputs.upsampler) is not None:
        enlarge = partial(enlarging_job, upsampler=upsampler, arguments=arguments)
        later = agreed(lambda: [enlarge(job) for job in jobs])
    share = arguments.share
    common.check({"share": str(share), **facts(jobs + later)})
    room = from_main(lambda: _check_outputs(jobs, later))
    if context.world.is_main:
        print(f"{len(jobs + later)} x {jobs[0].request.images:,} images: {room}", flush=True)
    draw = Drawing(context=context, state=state, share=share)
    status = draw.all(jobs)
    if status or not later:
        return status
    sums = from_main(lambda: [open_samples(job.output.path).checksum() for job in jobs])
    bases = zip(later, jobs, sums, strict=True)
    enlarged = agreed(lambda: [with_low_res(j, base=b, checksum=c) for j, b, c in bases])
    return draw.all(enlarged)


def _check_outputs(jobs: Sequence[DrawJob], later: Sequence[DrawJob]) -> str:
    """The disk space that the outputs need, in words; ValueError where one cannot be written."""
    paths = [job.output.path for job in (*jobs, *later)]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(
            f"two outputs would be {min(twice)}: give --scale and --cfg values that differ in "
            "their first 6 digits"
        )
    left = [job for job in (*jobs, *later) if not job.output.is_drawn()]
    for job in left:
        job.output.is_begun()
        job.output.check_picture()
    return check_room(left) if left else "all are drawn already"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    world = join(expected_size=arguments.ranks)
    patience = arguments.patience
    with (
        Preemption(DRAWING) as preemption,
        connected(world, patience=patience, gpus=arguments.gpus) as device,
        Watchdog(world, patience=patience, is_marked=False) as watchdog,
        noted(arguments.job if world.is_main else None, preemption=preemption) as state,
        ExitStack() as stack,
    ):
        stack.push(watchdog.on_error)
        watchdog.tell = state.fail
        context = RankContext(world=world, device=device, preemption=preemption, watchdog=watchdog)
        status = sample(arguments, context=context, state=state)
        state.note("stopped", state.why_stopped) if status else state.note("finished")
        return status


if __name__ == "__main__":
    run_as_rank(main)
