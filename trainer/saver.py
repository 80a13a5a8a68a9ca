"""Writing checkpoints: gathered from the ranks, written behind the training, committed by a rename.

The files are dealt to ranks, written by a thread from host copies, and the directory gets its name
when all ranks have agreed that all files are whole. A save that fails, as on a full disk, costs
itself alone: training goes on from what was committed before, and the next save tries again.
"""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from data import files
from trainer import weights
from trainer.config.sections import IntervalConfig
from trainer.ranks.faults import Broken, describe
from trainer.ranks.group import agreed, from_main, gather, writers
from trainer.ranks.world import World
from trainer.run.checkpoint import STATE, best, file_facts, sealed, superseded
from trainer.run.directory import Run
from trainer.run.runstate import committed
from trainer.run.trainstate import Gathered, TrainState

# The end of the name of what is being removed.
_REMOVED = ".removed"
# Seconds between two looks at files that are waited for.
_LOOK = 1.0
# Bytes that a checkpoint takes beside its tensors.
_ROOM = 2**20


class Saver:
    """Writes a run's checkpoints. All ranks make each call together.

    Training continues between `save` and the commit: at every step each rank sends its `flag` to
    the others, and passes what all of them sent to `poll`. When saves have failed for
    `unsaved_minutes`, the next that fails ends the run.
    """

    def __init__(
        self,
        run: Run,
        *,
        world: World,
        intervals: IntervalConfig,
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run = run
        self._intervals = intervals
        self._mark = mark
        self._world = world
        self._thread: threading.Thread | None = None
        self._state: TrainState | None = None
        self._facts: dict[str, Any] = {}
        self._error: str | None = None
        self._failure: str | None = None  # of the last save
        #: Whether what was saved last failed to be written, or was suspect and left.
        self.is_lost = False
        self._prunes, self._ends = True, False
        self._failing_since: float | None = None
        # What could not be removed, and has been said.
        self._stuck: set[Path] = set()
        # How often a `flag` was about the save that is pending.
        self._flags = 0

    def check_disk(self, source: Gathered) -> None:
        """Raise Broken unless the disk has room for a checkpoint, and the ranks can commit one."""
        # A name that no machine has seen before: NFS may show for a minute what had it.
        trial = self._run.checkpoints / from_main(lambda: f".{time.time_ns()}.partial")
        from_main(lambda: self._prepare(source, trial))
        agreed(lambda: (files.look_again(trial) / str(self._world.rank)).touch())
        from_main(lambda: self._try_commit(trial))

    def _try_commit(self, trial: Path) -> None:
        try:
            trial.rename(_aside(trial))
        except OSError as error:
            shutil.rmtree(trial, ignore_errors=True)
            said = (
                f"a directory cannot be renamed there ({error.strerror}), as checkpoints are: put "
                "--run on a file system that can, which mounted object stores cannot"
            )
            raise OSError(error.errno, said, str(self._run.path)) from None
        self._remove(())

    def save(
        self, source: Gathered, *, state: TrainState, prunes: bool = True, ends: bool = False
    ) -> None:
        """Copy the state to the host, then write it in the background.

        Unless it `prunes`, older checkpoints stay until the next commit. The last save `ends` them.

        Raises:
            Broken: no checkpoint could be written for too long.
            Refused: another start has taken the run over.
        """
        assert self._thread is None, "flush the last checkpoint before the next save"
        self._state, self._flags, self._prunes, self._ends = state, 0, prunes, ends
        directory = self._partial(state.images_seen)
        self._tell(from_main(lambda: _fault(lambda: self._prepare(source, directory))))
        if self.is_lost:
            return
        mine: dict[str, dict[str, Tensor]] = {}
        for kind, owner in writers(source.kinds, self._world):
            whole = source.gather(kind, to=owner)
            if owner == self._world.rank:
                mine[kind] = whole
        self._thread = threading.Thread(target=self._write, args=(directory, mine))
        self._thread.start()

    def flag(self) -> bool:
        """What this rank tells the others: whether its files are still on their way to disk."""
        self._flags += 1
        return self._thread is not None and self._thread.is_alive()

    def poll(self, *, writing: bool, failing_since: int | None = None) -> None:
        """Commit the pending checkpoint unless a rank was still `writing` at the previous step.

        Nor if it was saved since then, or is suspect, as for `flush`.

        Raises:
            As `flush`.
        """
        if self._flags > 1 and not writing and not self._is_suspect(failing_since):
            self.flush()

    def flush(self, *, failing_since: int | None = None) -> None:
        """Commit what is pending, if anything, waiting for it; then remove older checkpoints.

        Where all steps fail since a clock, what was saved there or later may be why: it is left
        uncommitted. What was committed before stays untouched where this fails.

        Raises:
            As `save`.
        """
        if self._thread is None:
            return
        self._wait_for(self._thread)
        self._thread = None
        if self._is_suspect(failing_since):
            self.is_lost = True  # the next save removes it
            return
        everyone = gather((self._facts, self._error))
        errors = [error for _, error in everyone if error]
        listed = {name: facts for rank, _ in everyone for name, facts in rank.items()}
        self._tell(from_main(lambda: errors[0] if errors else _fault(lambda: self._commit(listed))))

    def _wait_for(self, writing: threading.Thread) -> None:
        """Wait for this rank's files; as long as files grow, a slow disk is no rank that hangs."""
        known = -1
        while writing.is_alive():
            writing.join(_LOOK)
            partials = self._run.checkpoints.glob(".*.partial/**/*")
            with suppress(OSError):
                if known != (known := sum(file.stat().st_size for file in partials)):
                    self._mark("saving")

    def finish(self) -> None:
        """Commit what is pending, at the end; Broken where it could not be written."""
        self.flush()
        if self._failure is not None:
            raise Broken(
                f"the last checkpoint could not be written: {self._failure}; rerun the same "
                "command to resume from the one before"
            )

    def _is_suspect(self, failing_since: int | None) -> bool:
        if failing_since is None or self._state is None:
            return False
        return self._state.images_seen >= failing_since

    def _tell(self, failure: str | None) -> None:
        """Note how a save went, the same on all ranks; a failure is logged, and its rest freed.

        Raises:
            Broken: saves have failed for too long.
        """
        now = time.monotonic()
        self._failure, self.is_lost = failure, failure is not None
        if failure is None:
            return
        since = self._failing_since = self._failing_since or now
        limit = self._intervals.unsaved_minutes
        if self._world.is_main:
            due = f"; the next save is due in {self._intervals.checkpoint:,} images"
            after = "" if self._ends else f"{due}, or where the run stops"
            self._run.log(f"no checkpoint could be written: {failure}{after}")
            for partial in self._run.checkpoints.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        if from_main(lambda: now - since > 60 * limit):
            raise Broken(
                f"no checkpoint could be written for intervals.unsaved_minutes = {limit:g}: "
                f"{failure}; free the disk, and rerun the same command to resume from the last one"
            )

    def _prepare(self, source: Gathered, directory: Path) -> None:
        """Make the directory of a checkpoint that there is room for."""
        self._run.check_lease()
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        self._remove(self._run.checkpoints.glob(".*.partial"))
        self._require_room(source)
        directory.mkdir()

    def _require_room(self, source: Gathered) -> None:
        """Raise OSError unless a checkpoint fits on the disk."""
        needed = len(source.kinds) * source.parameter_count * 4 + _ROOM
        free = shutil.disk_usage(self._run.checkpoints).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint takes {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} are free",
                str(self._run.checkpoints),
            )

    def _commit(self, listed: Mapping[str, Any]) -> None:
        assert self._state is not None
        self._run.settle()
        state = self._state
        partial = self._partial(state.images_seen)
        final = self._run.checkpoints / f"{state.images_seen:012d}"
        files.write(partial / STATE, json.dumps(sealed(state, files=listed), indent=1))
        if final.exists():  # this one was damaged, and an older one was resumed
            final.rename(_aside(final))
        partial.rename(final)
        self._failing_since = None
        files.sync(self._run.checkpoints)
        self._run.log(f"checkpoint {final.name} committed")
        self._run.note(checkpoint=final.name, images_seen=state.images_seen)
        if self._prunes:
            self._prune(until=state.images_seen)

    def _partial(self, images_seen: int) -> Path:
        return self._run.checkpoints / f".{images_seen:012d}.partial"

    def _write(self, directory: Path, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._facts, self._error = {}, None
        try:
            files.look_again(directory)
            for kind, tensors in kinds.items():
                file = directory / f"{kind}.safetensors"
                # One entry alone: safetensors writes several in any order, and the files of equal
                # states would differ.
                weights.save(file, tensors, metadata={"kind": kind})
                weights.compare(file, tensors)
                self._facts[file.name] = file_facts(file)
        except Exception as error:  # whatever it is, this checkpoint must not be committed
            self._error = f"rank {self._world.rank}: {directory}: {type(error).__name__}: {error}"

    def _prune(self, *, until: int) -> None:
        # A newer one, where it could not be moved away, is damaged: the run resumed from an older.
        names = [n for p in committed(self._run.checkpoints) if (n := int(p.name)) <= until]
        every = self._intervals
        old = superseded(names, keep=every.keep, keep_every=every.keep_every)
        paths = [self._run.checkpoints / f"{images_seen:012d}" for images_seen in old]
        spared = best(committed(self._run.checkpoints)) if every.keep_best else None
        self._remove(path for path in paths if path != spared)

    def _remove(self, directories: Iterable[Path]) -> None:
        """Remove directories and what earlier attempts left; a failure is logged once.

        A directory is renamed first, so that one that is half removed does not look committed.
        """
        left = list(self._run.checkpoints.glob(f".*{_REMOVED}"))
        for path in [*left, *directories]:
            try:
                if path not in left:
                    path = path.rename(_aside(path))
                shutil.rmtree(path)
            except OSError as error:
                if path not in self._stuck:
                    self._stuck.add(path)
                    why = error.strerror or error
                    self._run.log(
                        f"cannot remove {path}: {why}; tried again at each checkpoint. Where it "
                        "stays, let its owner remove it"
                    )


def _fault(act: Callable[[], object]) -> str | None:
    """Why the disk did not let `act` happen."""
    try:
        act()
    except OSError as error:
        return describe(error)
    return None


def _aside(path: Path) -> Path:
    """A new name for a checkpoint that is to be removed."""
    return path.with_name(f".{path.name.strip('.')}.{time.time_ns()}{_REMOVED}")
