"""What is done about a step that was refused, and what is kept of it in `RUN/incidents.jsonl`.

The step is replayed before anything is blamed: where ranks disagree the job ends and names the
machine; else the step stays skipped, and after too many in a row the run goes back.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import files
from trainer.engine.gate import StepReport
from trainer.guards.audit import Audit, Finding
from trainer.ranks.faults import Broken
from trainer.ranks.group import gather
from trainer.ranks.world import World
from trainer.run.checkpoint import Checkpoint, latest_valid
from trainer.run.directory import Run
from trainer.saver import Saver
from trainer.seen import Seen
from trainer.start import Parts, restore

# Images and gradients that an incident names.
_NAMED = 8


class Incidents:
    """Handles refused steps. All ranks call each method together."""

    def __init__(self, parts: Parts, *, saver: Saver) -> None:
        self.parts, self._saver, self._audit = parts, saver, Audit(parts)

    def handle(self, report: StepReport, seen: Seen, *, images_seen: int, now: int) -> int | None:
        """Record a refused step from `images_seen` to `now`; after too many in a row go back.

        The clock of the checkpoint that it went back to, if it did.

        Raises:
            Broken: the replay shows that a machine is at fault.
            Refused: the run cannot go back any more.
        """
        losses = torch.cat([terms["loss"].detach().float() for _, terms in seen]).cpu()
        finding = self._audit.check(images_seen, micro_batches=len(seen), losses=losses)
        too_many = self.parts.guards.count(images_seen=images_seen)
        entry = {
            "images": images_seen,
            "fault": report.fault,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "loss_scale": report.loss_scale,
            "in_a_row": self.parts.guards.row,
            "replay": self._replayed(report, finding),
            "worst": self._worst_images(seen, losses, finding.hosts),
            "gradients": self._gradients(seen, finding),
        }
        self._keep(entry)
        self.parts.log(f"step at image {images_seen:,} skipped: {report.fault}; {_named(entry)}")
        self._end_if_faulty(finding)
        if not too_many:
            return None
        self._saver.flush(failing_since=self.parts.guards.failing_since)
        return self._roll_back(now)

    def check(self, images_seen: int) -> None:
        """Audit a micro-batch of the step that begins at `images_seen`, ahead of it.

        Raises:
            Broken: a machine is at fault.
        """
        finding = self._audit.check(images_seen, micro_batches=1)
        if finding.faults:
            fault = "the audit in ordinary running"
            self._keep({"images": images_seen, "fault": fault, "replay": finding.described()})
        self._end_if_faulty(finding)

    def _roll_back(self, now: int) -> int:
        """Take the state of a checkpoint from before the refused steps, whose clock is returned.

        The run's own clock goes on, past the images since: with them it would come to the same
        steps again.

        Raises:
            Refused: there is no such checkpoint, or the run has gone back too often.
        """
        parts, engine, guards = self.parts, self.parts.engine, self.parts.guards
        found, why = None, "no rollback is left"
        if guards.may_roll_back():
            found, why = self._before(), "no checkpoint is older"
        if found is None:
            guards.refuse(f"{guards.row} steps in a row were skipped and {why}", images_seen=now)
        skipped = engine.skipped
        restore(found, engine.kinds, engine=engine, objective=parts.objective)
        engine.renew(images_seen=now)
        engine.skipped = skipped
        guards.roll_back(found.state.guards, to=found.images_seen, now=now)
        parts.log(
            f"rolled back to checkpoint {found.path.name}; the run goes on at image {now:,}, past "
            "the images since"
        )
        return found.images_seen

    def _before(self) -> Checkpoint | None:
        """The checkpoint that a rollback takes: the last from before the refused steps.

        Where none was written since the last rollback, that one did not help: an older one is
        taken, if there is any.
        """
        guards = self.parts.guards
        found = self._newest(guards.since - 1)
        if found is None:
            # It has the weights that the first refused step was computed with: better than none.
            return self._newest(guards.since)
        if found.images_seen < guards.went_back_at:
            return self._newest(guards.went_back_to - 1) or found
        return found

    def _newest(self, until: int) -> Checkpoint | None:
        """The newest valid checkpoint that is not later than this clock."""
        parts = self.parts
        valid, _ = latest_valid(
            parts.run.checkpoints, kinds=parts.engine.kinds, world=parts.world, until=until
        )
        return valid

    def _end_if_faulty(self, finding: Finding) -> None:
        if not finding.faults:
            return
        hosts = sorted({finding.hosts[rank] for rank in finding.faults})
        if self.parts.world.is_main:
            # The job script excludes the hosts of `lost` that are listed already.
            run, text = self.parts.run, "".join(f"{host}\n" for host in hosts)
            listed = run.path / "launch" / "lost-hosts"
            run.attempt("launch/lost-hosts", lambda: files.append(listed, text))
        raise Broken(
            f"hardware fault: {finding.described()}; its checkpoints are intact: exclude "
            f"{', '.join(hosts)} from the job (Slurm jobs of `launch` do so) and rerun the same "
            "command to resume from the last one",
            hosts=",".join(hosts),
        )

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Append a row to `incidents.jsonl`."""
        if self.parts.world.is_main:
            row = json.dumps({"time": time.time(), **_for_json(entry)}) + "\n"
            self.parts.run.add_row("incidents.jsonl", row)

    @staticmethod
    def _replayed(report: StepReport, finding: Finding) -> str:
        """What the replays say: a mean of gradients has no larger norm than they have."""
        if finding.faults:
            return finding.described()
        norms = [replay.norm for replay in finding.replays]
        most = math.fsum(norms) / len(norms)
        if math.isfinite(report.loss) and math.isfinite(most) and report.grad_norm > 1.1 * most:
            return f"not reproduced: the gradients' norm is at most {most:.4g} in the replay"
        return "the same on two ranks"

    def _worst_images(
        self, seen: Seen, losses: Tensor, hosts: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The images with the worst losses of all ranks: those not finite, else the largest."""
        indices = torch.cat([indices for indices, _ in seen]).tolist()
        t = torch.cat([terms["t"] for _, terms in seen]).tolist()
        rank, host = self.parts.world.rank, hosts[self.parts.world.rank]
        mine: list[dict[str, Any]] = [
            {"rank": rank, "host": host, "image": index, "t": step, "loss": loss}
            for loss, index, step in zip(losses.tolist(), indices, t, strict=True)
        ]
        mine = sorted(mine, key=lambda row: (_order(row["loss"]), row["image"]))[:_NAMED]
        everyone = [row for rows in gather(mine) for row in rows]
        worst = sorted(everyone, key=lambda row: _order(row["loss"]))[:_NAMED]
        for row in worst:
            row["key"] = self.parts.stream.key(row["image"]) if self.parts.world.is_main else ""
        return worst

    def _gradients(self, seen: Seen, finding: Finding) -> list[dict[str, Any]]:
        """The ranks with the worst gradients, the parameter and the micro-batch of each."""
        indices = gather([indices.tolist() for indices, _ in seen])
        rows: list[dict[str, Any]] = []
        for rank, replay in enumerate(finding.replays):
            norm, number = _worst(replay.norms)
            _, micro = _worst(replay.micro_norms)
            row = {
                "rank": rank,
                "host": finding.hosts[rank],
                "parameter": self.parts.engine.names[number],
                "norm": norm,
                "micro_batch": indices[rank][micro],
                "micro_batch_norm": replay.micro_norms[micro],
            }
            rows.append(row)
        return sorted(rows, key=lambda row: _order(row["micro_batch_norm"]))[:_NAMED]


@contextmanager
def failed_gpus_noted(path: Path, *, world: World) -> Iterator[None]:
    """Note the hosts whose GPUs fail before the run is claimed, as those that fail later are.

    The job script excludes them when they fail again.
    """
    try:
        yield
    except Broken as error:
        if error.hosts and world.is_main and (path / "launch").is_dir():
            with suppress(OSError, ValueError), Run(path).claimed():
                raise
        raise


def _order(value: float) -> float:
    """What sorts values from the worst: those that are not finite, then the largest."""
    return -value if math.isfinite(value) else -math.inf


def _worst(values: Sequence[float]) -> tuple[float, int]:
    """The worst value and its place: of those that are not finite, the last, next to the loss."""
    place = min(range(len(values)), key=lambda n: (_order(values[n]), -n))
    return values[place], place


def _named(entry: Mapping[str, Any]) -> str:
    image, gradient = entry["worst"][0], entry["gradients"][0]
    return (
        f"worst: image {image['image']:,} ({image['key']}), t = {image['t']}, loss "
        f"{image['loss']:.4g}, on rank {image['rank']} ({image['host']}); gradient of "
        f"{gradient['parameter']} {gradient['norm']:.4g} on rank {gradient['rank']}; "
        f"replay: {entry['replay']}; more in incidents.jsonl"
    )


def _for_json(value: Any) -> Any:
    """For JSON, which has no numbers that are not finite: those become text."""
    if isinstance(value, Mapping):
        return {key: _for_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_for_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
