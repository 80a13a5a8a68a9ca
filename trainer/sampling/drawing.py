"""All ranks draw an output: each takes the next part that is missing, until none is."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from data import files
from data.exits import TO_BE_CONTINUED
from data.progress import Progress, duration
from trainer.ranks.context import RankContext
from trainer.ranks.faults import Broken, StoppedError
from trainer.ranks.group import Turns, agreed, from_main, gather
from trainer.run.lease import Lease, live_holder
from trainer.sampling.jobstate import JobState
from trainer.sampling.parts import DrawJob, PartSampler
from trainer.sampling.samplefile import RECORD


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Draws jobs on all ranks. All ranks make each call together."""

    context: RankContext
    #: Notes each part that is drawn, for `python -m launch`.
    state: JobState
    #: (K, N): these ranks draw the parts K, K + N, ...; other processes draw the other shares.
    share: tuple[int, int] = (0, 1)

    def all(self, jobs: Sequence[DrawJob]) -> int:
        """Draw jobs of the same networks, which are loaded once; returns the exit status."""
        todo = [job for job in jobs if not self._is_drawn(job)]
        if not todo:
            return 0
        source, classifier = todo[0].source, todo[0].classifier
        device, precision = self.context.device, todo[0].request.precision
        net = source.net(device=device, precision=precision, say=self._say)
        guide = None
        if classifier is not None:
            guide = classifier.net(device=device, precision=precision, say=self._say)
        for number, job in enumerate(todo, start=1):
            if len(todo) > 1:
                self._say(f"drawing {job.output.path}, {number} of {len(todo)} outputs")
            if status := self.one(job, net=net, guide=guide):
                return status
        return 0

    def one(self, job: DrawJob, *, net: nn.Module, guide: nn.Module | None) -> int:
        """Draw one job's output; returns the exit status."""
        output = job.output
        if self._is_drawn(job):  # by another job, since this one began
            return 0
        from_main(output.open)
        with ExitStack() as stack:
            claim: AbstractContextManager[Lease | None]
            claim = output.claimed(self.share) if self.context.world.is_main else nullcontext()
            lease = agreed(lambda: stack.enter_context(claim))
            sampler = PartSampler(job, net=net, classifier=guide, device=self.context.device)
            if not self._draw(job, sampler):
                self._say(f"stopped {self.state.why_stopped}; {self.state.way_to_resume}")
                return TO_BE_CONTINUED
            if self.share == (0, 1):
                self._say(f"joining {job.output.parts:,} batches")
                self._write(job, lambda: _publish(job, lease))
        if self.share != (0, 1) and (missing := self._write(job, lambda: _publish_shares(job))):
            self._say(f"share {self.share[0]} of {self.share[1]} is drawn; {missing}")
            return 0
        self._say(f"wrote {output.path} and {output.picture}")
        return 0

    def _is_drawn(self, job: DrawJob) -> bool:
        is_drawn = from_main(job.output.is_drawn)
        if is_drawn:
            self._say(f"{job.output.path} is drawn already")
        return is_drawn

    def _draw(self, job: DrawJob, sampler: PartSampler) -> bool:
        """Draw the missing parts, each by the next rank that is free; False if it was stopped."""
        todo, turns = self._undrawn(job), Turns()
        progress = _Progress(job, parts=len(todo), steps=sampler.steps, context=self.context)

        def on_step() -> None:
            progress.advance()
            if self.context.stop_requested:
                raise StoppedError

        # Why this rank ended before all parts were taken: a fault, or "" where it was stopped.
        ended: str | None = None
        written = 0
        try:
            while (turn := turns.take()) < len(todo):
                job.output.write(todo[turn], *sampler.draw(todo[turn], on_step=on_step))
                written += 1
                self.state.advance()
                progress.show(turns.taken())
        except (StoppedError, OSError) as error:
            turns.end()  # no rank begins another part
            is_fault = isinstance(error, OSError)
            ended = f"part {todo[turn]}: {files.reason(error)}" if is_fault else ""
        everyone, counts = zip(*gather((ended, written)), strict=True)
        self.state.advance(sum(counts) - written)
        if faults := [f"rank {r}: {e}" for r, e in enumerate(everyone) if e]:
            raise Broken(_cannot_write(job, faults[0]))
        return all(each is None for each in everyone)

    def _write(self, job: DrawJob, write: Callable[[], str]) -> str:
        """Call `write` on the main rank; its result on all ranks, Broken where the disk fails."""

        def attempt() -> str:
            try:
                return write()
            except OSError as error:
                raise OSError(_cannot_write(job, files.reason(error))) from None

        return from_main(attempt)

    def _undrawn(self, job: DrawJob) -> list[int]:
        """The missing or damaged parts, on all ranks; each rank checks some of those on disk."""
        share, shares = self.share
        listed = [part for part in from_main(job.output.listed) if part % shares == share]
        if listed:
            self._say(f"checking {len(listed):,} batches that are there")
        mine: dict[int, str] = {}
        world = self.context.world
        own = listed[world.rank :: world.size]
        progress = Progress(
            total=len(own), unit="batches checked", shown=world.is_main, say=self._say
        )
        for part in progress.over(own):
            if fault := job.output.fault(part, job.recorded(part)):
                mine[part] = fault
        damaged = {part: fault for faults in gather(mine) for part, fault in faults.items()}
        for part in sorted(damaged):
            name = f"part {part} of {job.output.work}"
            self._say(f"{name} is damaged and is drawn again: {damaged[part]}")
        whole = set(listed) - set(damaged)
        return [part for part in range(share, job.output.parts, shares) if part not in whole]

    def _say(self, text: str) -> None:
        if self.context.world.is_main:
            print(text, flush=True)


class _Progress:
    """Shows on the main rank how far an output is: by step on a terminal, and by part."""

    def __init__(self, job: DrawJob, *, parts: int, steps: int, context: RankContext) -> None:
        world, clock = context.world, context.watchdog.clock
        self._parts, self._world, self._batch = parts, world, job.request.batch
        self._clock, self._began = clock, clock()
        total, shown = -(-parts // world.size) * steps, world.is_main
        self._line = Progress(total=total, unit="denoising steps", shown=shown, clock=clock)

    def advance(self) -> None:
        """Count a denoising step of this rank."""
        self._line.advance()

    def show(self, taken: int) -> None:
        """Print how many parts are done and the time left; all ranks together took `taken`."""
        if not self._world.is_main:
            return
        done = max(1, min(taken, self._parts) - self._world.size + 1)
        seconds = self._clock() - self._began
        left = duration(seconds / done * (self._parts - done))
        rate = f"{done * self._batch / seconds:,.2f} images/s"
        print(f"batch {done:,} of {self._parts:,}, {rate}, {left} left", flush=True)


def _publish_shares(job: DrawJob) -> str:
    """Make the output if no part is missing; returns why it did not, or ""."""
    missing = job.output.parts - len(job.output.listed())
    try:
        if job.output.is_drawn():
            return "another share made the output"
        if missing:
            return f"{missing} of {job.output.parts} batches are left to the other shares"
        with job.output.claimed() as lease:
            return _publish(job, lease)
    except ValueError:
        if live_holder(job.output.work) is None and not job.output.is_drawn():
            raise
        return "another share makes the output"


def _publish(job: DrawJob, lease: Lease | None) -> str:
    """Make the output of its parts, and the grid beside it; returns "".

    Raises:
        ValueError: a part is damaged, or another process has drawn the output.
    """
    assert lease is not None, "the main rank alone has the right to write"
    lease.check()
    job.output.check_free()
    whole = job.output.assemble(job.all_labels())
    about = PngInfo()
    about.add_text(RECORD, json.dumps(vars(job.request)))
    with files.whole(job.output.picture) as stream:
        grid = Image.fromarray(job.grid(whole).transpose(1, 2, 0))
        grid.save(stream, format="png", pnginfo=about)
    job.output.publish(whole)
    return ""


def _cannot_write(job: DrawJob, why: str) -> str:
    return f"cannot write {job.output.work}: {why}; rerun the same command to resume"
