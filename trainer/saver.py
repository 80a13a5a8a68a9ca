"""Writing checkpoints: gathered from the ranks, written behind the training, committed by a rename.

The files are dealt to ranks, written by a thread from host copies, and the directory gets its name
when all ranks have agreed that all files are whole.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from data import files
from trainer.checkpoint import STATE, committed, file_facts, sealed, superseded
from trainer.ranks.group import Broken, gather
from trainer.ranks.world import World
from trainer.run import Run
from trainer.state import TrainState

# The end of the name of what is being removed.
_REMOVED = ".removed"


class Gathered(Protocol):
    """Sharded state that can be gathered by kind and name (the engine)."""

    kinds: tuple[str, ...]

    def gather(self, kind: str, *, to: int | None) -> dict[str, Tensor]:
        """Whole fp32 tensors on the host by parameter name, on rank `to`."""
        ...


class Saver:
    """Writes a run's checkpoints. All ranks make each call together.

    Training continues between `save` and the commit: at every step each rank sends its `flag` to
    the others, and passes what all of them sent to `poll`.
    """

    def __init__(self, run: Run, *, world: World, keep: int, keep_every: int | None = None) -> None:
        self._run = run
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._mode = 0o666 & ~_umask()
        self._thread: threading.Thread | None = None
        self._state: TrainState | None = None
        self._facts: dict[str, Any] = {}
        self._error: str | None = None
        # Whether the last `flag`, and the one before, were about the save that is pending.
        self._flagged = self._known = False

    def save(self, source: Gathered, *, state: TrainState) -> None:
        """Copy the state to the host, then write it in the background."""
        assert self._thread is None, "flush the last checkpoint before the next save"
        self._state, self._flagged = state, False
        directory = self._partial(state.images_seen)
        if self._world.is_main:
            self._run.check_lease()
            self._run.checkpoints.mkdir(parents=True, exist_ok=True)
            self._remove(self._run.checkpoints.glob(".*.partial"))
            directory.mkdir()
        dist.barrier()
        mine: dict[str, dict[str, Tensor]] = {}
        for number, kind in enumerate(source.kinds):
            owner = _owner(number, self._world)
            whole = source.gather(kind, to=owner)
            if owner == self._world.rank:
                mine[kind] = whole
        self._thread = threading.Thread(target=self._write, args=(directory, mine))
        self._thread.start()

    def flag(self) -> bool:
        """What this rank tells the others: whether its files are still on their way to disk."""
        self._known, self._flagged = self._flagged, self._thread is not None
        return self._thread is not None and self._thread.is_alive()

    def poll(self, *, writing: bool) -> None:
        """Commit the pending checkpoint unless a rank was still `writing` at the previous step.

        Raises:
            As `flush`.
        """
        if self._known and not writing:
            self.flush()

    def flush(self) -> None:
        """Commit what is pending, if anything, waiting for it; then remove older checkpoints.

        What was committed before stays untouched where this fails.

        Raises:
            Broken: a rank could not write its files.
            ValueError: another start has taken the run over.
        """
        if self._thread is None:
            return
        assert self._state is not None
        self._thread.join()
        self._thread, self._flagged = None, False
        everyone = gather((self._facts, self._error))
        errors = [error for _, error in everyone if error]
        if errors:
            raise Broken(f"the checkpoint could not be written: {errors[0]}")
        if self._world.is_main:
            self._commit(
                self._state, {name: f for facts, _ in everyone for name, f in facts.items()}
            )

    def _commit(self, state: TrainState, listed: Mapping[str, Any]) -> None:
        self._run.check_lease()
        partial = self._partial(state.images_seen)
        final = self._run.checkpoints / f"{state.images_seen:012d}"
        files.write(partial / STATE, json.dumps(sealed(state, files=listed), indent=1))
        if final.exists():  # this one was damaged, and an older one was resumed
            final.rename(_aside(final))
        partial.rename(final)
        files.sync(self._run.checkpoints)
        self._run.log(f"checkpoint {final.name} committed")
        self._run.note(checkpoint=final.name, images_seen=state.images_seen)
        self._prune(until=state.images_seen)

    def _partial(self, images_seen: int) -> Path:
        return self._run.checkpoints / f".{images_seen:012d}.partial"

    def _write(self, directory: Path, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert self._state is not None
        self._facts, self._error = {}, None
        try:
            for kind, tensors in kinds.items():
                file = directory / f"{kind}.safetensors"
                metadata = {"images": str(self._state.images_seen), "kind": kind}
                save_file(dict(tensors), file, metadata=metadata)
                with suppress(OSError):  # some file systems have no modes
                    file.chmod(self._mode)  # safetensors makes it readable by its owner only
                files.sync(file)
                self._facts[file.name] = file_facts(file)
        except Exception as error:  # whatever it is, this checkpoint must not be committed
            self._error = f"rank {self._world.rank}: {directory}: {type(error).__name__}: {error}"

    def _prune(self, *, until: int) -> None:
        # A newer one, where it could not be moved away, is damaged: the run resumed from an older.
        names = [n for p in committed(self._run.checkpoints) if (n := int(p.name)) <= until]
        old = superseded(names, keep=self._keep, keep_every=self._keep_every)
        self._remove(self._run.checkpoints / f"{images_seen:012d}" for images_seen in old)

    def _remove(self, directories: Iterable[Path]) -> None:
        """Remove directories and what earlier attempts left; a failure is logged and tried again.

        A directory is renamed first, so that one that is half removed does not look committed.
        """
        left = list(self._run.checkpoints.glob(f".*{_REMOVED}"))
        for path in [*left, *directories]:
            try:
                aside = path if path in left else path.rename(_aside(path))
                shutil.rmtree(aside)
            except OSError as error:
                self._run.log(f"cannot remove {path}: {error}; tried again at the next checkpoint")


def _owner(number: int, world: World) -> int:
    """The rank that writes file `number`.

    The first ranks of all nodes come first, so that as many nodes as there are files share the
    gathering and the writing; then their second ranks. Ranks are numbered node by node.
    """
    nodes = max(1, world.size // world.local_size)
    return (number % nodes * world.local_size + number // nodes) % world.size


def _aside(path: Path) -> Path:
    """A new name for a checkpoint that is to be removed."""
    return path.with_name(f".{path.name.strip('.')}.{time.time_ns()}{_REMOVED}")


@cache
def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
