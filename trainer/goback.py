"""`--from CHECKPOINT`: a run goes back to an older checkpoint, once.

What came after it is renamed, never deleted: checkpoints to `NAME.set-aside`, rows of metrics.jsonl
to `metrics.set-aside.jsonl`. `RUN/launch/from.json` records it, so that the same command, which a
scheduler may run again, does not go back a second time.
"""

import json
import time
from pathlib import Path

from data import files
from trainer import checkpoint as checkpoints
from trainer.run import Run
from trainer.watch.board import rows_after

_ASIDE = "set-aside"


def go_back(run: Run, wanted: str) -> None:
    """Set aside what is newer than the checkpoint `wanted`: its name, its images, or its path.

    Raises:
        ValueError: the run has no such checkpoint, or it is damaged.
        OSError: something cannot be renamed.
    """
    target = _find(run, wanted)
    if _last(run) == target.name:
        run.log(
            f"--from {wanted} was done before, and is not done again; to go back once more, "
            f"delete {_record(run)}"
        )
        return
    if faults := checkpoints.faults_of(target):
        raise ValueError(f"--from {wanted}: the checkpoint is damaged: {faults[0]}")
    run.check_lease()
    later = [path for path in checkpoints.committed(run.checkpoints) if path.name > target.name]
    rows = rows_after(run.path / "metrics.jsonl", int(target.name))
    if rows:
        files.append(run.path / f"metrics.{_ASIDE}.jsonl", "".join(f"{row}\n" for row in rows))
    for path in later:
        files.set_aside(path, _ASIDE)
    files.write(_record(run), json.dumps({"from": target.name, "time": time.time()}) + "\n")
    run.log(
        f"went back to checkpoint {target.name}: {len(later)} later checkpoints and {len(rows)} "
        f"rows of metrics are set aside (*.{_ASIDE}*)"
    )


def _find(run: Run, wanted: str) -> Path:
    given = Path(wanted)
    elsewhere = len(given.parts) > 1 and given.resolve().parent != run.checkpoints.resolve()
    found = checkpoints.committed(run.checkpoints)
    match = [p for p in found if given.name.isdigit() and int(p.name) == int(given.name)]
    if elsewhere or not match:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"--from {wanted}: {run.path} has no such checkpoint; it has: {names}"
            + (" (weights of another run: --init)" if elsewhere else "")
        )
    return match[0]


def _last(run: Run) -> str | None:
    """The checkpoint that the run went back to the last time."""
    try:
        name: str = json.loads(_record(run).read_text())["from"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return name


def _record(run: Run) -> Path:
    return run.path / "launch" / "from.json"
