"""`RUN/launch/state.json`: the state of a run, for programs: the job script, `status`, the tests;
and which checkpoints it has.

It tells of starts that claimed the run; one that is refused before leaves no trace here. The
trainer's main rank writes it. A run that was killed keeps the state "running". log.txt is for
people, and no program reads it.
"""

import json
import os
import re
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data import files
from trainer.config import settings

#: The name of a checkpoint: its clock, in images.
CHECKPOINT = re.compile(r"\d{12}")

State = Literal["running", "finished", "stopped", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run last recorded about itself."""

    state: State
    #: The clock at the last report or checkpoint.
    images_seen: int = 0
    #: How many times the run was started, this time included.
    starts: int = 0
    #: When the last start claimed the run, in seconds since 1970; None in earlier releases' files.
    began: float | None = None
    #: The name of the last checkpoint that was committed; of a drawing job, its batches so far.
    checkpoint: str | None = None
    #: Why the run is no longer running.
    why: str | None = None
    #: The hosts whose ranks were lost or hung in the last start, with commas between them.
    lost: str | None = None
    #: The release and the commit of the code that the last start runs.
    version: str | None = None
    #: The scheduler's id of the job.
    job_id: str | None = None

    @classmethod
    def read(cls, run: Path) -> "RunState | None":
        """The state of a run; None when the file is missing or damaged.

        Raises:
            OSError: the file cannot be read now.
        """
        try:
            state: RunState = settings.from_json(cls, file(run).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return state

    def write(self, run: Path) -> None:
        """Write it with one entry on each line, as the job script's `sed` expects."""
        # Ranks of several hosts, and two threads of one, may note a lost rank at once.
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        text = json.dumps({"format": "run-state-1", **asdict(self)}, indent=1)
        files.write(file(run), text + "\n", writer=writer)


def committed(checkpoints: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first."""
    found = set(checkpoints.iterdir()) if checkpoints.is_dir() else set()
    # NFS may list for a minute what was there before; the run's state is read afresh.
    state = RunState.read(checkpoints.parent)
    if state is not None and state.checkpoint is not None:
        last = checkpoints / state.checkpoint
        if os.path.isdir(last):  # False on errors, unlike that of a Path
            found.add(last)
    return sorted((p for p in found if CHECKPOINT.fullmatch(p.name)), reverse=True)


def file(run: Path) -> Path:
    """The file of a run's state."""
    return run / "launch" / "state.json"
