"""`--from CHECKPOINT`: a run goes back to an older checkpoint, once.

What came after it is renamed, never deleted: checkpoints, grids and evaluations to
`NAME.set-aside`, rows of metrics.jsonl to `metrics.set-aside.jsonl`. `RUN/launch/from.json` records
it, so that the same command, which a scheduler may run again, does not go back a second time.
"""

from collections.abc import Callable

from data import files
from trainer.run import checkpoint as checkpoints
from trainer.run import history, origin
from trainer.run.checkpoint import Checkpoint
from trainer.run.directory import Run
from trainer.run.runstate import committed

_ASIDE = "set-aside"


def go_back(run: Run, wanted: str, *, check: Callable[[Checkpoint], None]) -> None:
    """Set aside what is newer than the checkpoint `wanted`: its name, its images, or its path.

    `check` raises ValueError where the run may not resume from it; nothing is set aside then.

    Raises:
        ValueError: as `check`; or the run has no such checkpoint, or it is damaged.
        OSError: something cannot be renamed.
    """
    if origin.was_done(run.path, wanted):
        run.log(
            f"--from {wanted} was done before, and is not done again; to go back once more, "
            f"delete {origin.record_file(run.path)}"
        )
        return
    target = origin.find(run.path, wanted)
    if fault := checkpoints.fault_of(target):
        raise ValueError(f"--from {wanted}: the checkpoint is damaged: {fault}")
    check(checkpoints.read(target))
    run.check_lease()
    later = [path for path in committed(run.checkpoints) if path.name > target.name]
    # Like checkpoints these are named by the clock.
    kept = [*run.samples.glob("[0-9]*.png"), *run.evaluations.glob("[0-9]*.json")]
    beside = [path for path in kept if path.stem > target.name]
    after = [row for row in history.read(run.path) if row["images"] > int(target.name)]
    if after:
        files.append(run.path / f"metrics.{_ASIDE}.jsonl", "".join(map(history.text, after)))
    for path in [*later, *beside]:
        files.set_aside(path, _ASIDE)
    origin.record(target, run=run.path)
    run.log(
        f"went back to checkpoint {target.name}: {len(later)} later checkpoints, {len(after)} rows "
        f"of metrics, and {len(beside)} grids and evaluations are set aside (*.{_ASIDE}*)"
    )
