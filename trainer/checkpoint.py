"""Checkpoints: gathered from the ranks, written behind the training, committed by one rename.

`RUN/checkpoints/000002560000/` (the clock, in images) holds one safetensors file for each kind of
fp32 state (`model`, `ema-0.9999`, `adam-m`, `adam-v`), keyed by the reference's state-dict names,
and `state.json`: the clock, what is not a tensor, the size and sha256 of every file, and a checksum
of itself. The files
are dealt to ranks, written by a thread from host copies, and the directory gets its name when all
ranks have agreed that all files are whole. Any world size and ZeRO stage loads any checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.world import World
from trainer.group import Broken

#: What makes a directory a checkpoint.
STATE = "state.json"
#: The checksum of the rest of state.json. Checkpoints of version 0.1 have none.
_SELF = "sha256"
_NAME = re.compile(r"\d{12}")
#: The end of the name of what is being removed.
_REMOVED = ".removed"
#: What a checkpoint's state holds at least.
_FORM = {"images": int, "engine": dict, "timesteps": dict, "order": dict, "files": dict}


class Gathered(Protocol):
    """Sharded state that can be gathered by kind and name (the engine)."""

    kinds: tuple[str, ...]

    def gather(self, kind: str, *, to: int | None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: whole when it was written, checked again before it is loaded."""

    path: Path
    state: Mapping[str, Any]

    @property
    def images(self) -> int:
        images: int = self.state["images"]
        return images

    def file(self, kind: str) -> Path:
        return self.path / f"{kind}.safetensors"

    def faults(self) -> list[str]:
        """What is wrong with the files: missing, torn or damaged. Reads every byte."""
        return [
            fault
            for name, facts in self.state["files"].items()
            if (fault := _fault(self.path / name, facts)) is not None
        ]


def committed(checkpoints: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else iter(())
    return sorted((p for p in found if _NAME.fullmatch(p.name)), reverse=True)


def read(path: Path) -> Checkpoint:
    """Open one committed checkpoint directory.

    Raises:
        ValueError: its state.json is missing, damaged, or that of another checkpoint.
    """
    try:
        state = json.loads((path / STATE).read_text())
        fault = _state_fault(path, state)
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ValueError(f"{path / STATE}: {fault}")
    return Checkpoint(path, state)


def _state_fault(path: Path, state: Any) -> str | None:
    """What is wrong with a checkpoint's state as it was read."""
    if not isinstance(state, dict):
        return "it is no JSON object"
    if _SELF in state and state[_SELF] != _checksum(state):
        return "it does not match its own checksum"
    for name, kind in _FORM.items():
        if not isinstance(state.get(name), kind):
            return f"{name} = {state.get(name)!r}: it must be of type {kind.__name__}"
    if _NAME.fullmatch(path.name) and state["images"] != int(path.name):
        return f"images = {state['images']}: it must be {int(path.name)}, as the directory says"
    return None


def _checksum(state: Mapping[str, Any]) -> str:
    """The checksum of a state without its own checksum."""
    rest = {name: value for name, value in state.items() if name != _SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def latest_valid(
    checkpoints: Path, *, kinds: Sequence[str], world: World
) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint with files of these kinds, and a line for each newer one.

    All ranks must call it; each reads its share of the files, and all get the same answer.
    """
    paths = [committed(checkpoints)] if world.is_main else [None]
    dist.broadcast_object_list(paths)
    skipped: list[str] = []
    for path in paths[0] or []:
        fault = _agreed_fault(path, kinds=kinds, world=world)
        if fault is None:
            return read(path), skipped
        skipped.append(f"checkpoint {path.name} is damaged and skipped: {fault}")
    return None, skipped


def _agreed_fault(path: Path, *, kinds: Sequence[str], world: World) -> str | None:
    try:
        checkpoint = read(path)
        mine = _kinds_fault(checkpoint, kinds)
        files = sorted(checkpoint.state["files"].items())[world.rank :: world.size]
        mine = mine or next((f for name, facts in files if (f := _fault(path / name, facts))), None)
    except ValueError as error:
        mine = str(error)
    faults: list[str | None] = [None] * world.size
    dist.all_gather_object(faults, mine)
    return next((fault for fault in faults if fault), None)


def _kinds_fault(checkpoint: Checkpoint, kinds: Sequence[str]) -> str | None:
    listed = checkpoint.state["files"]
    missing = [kind for kind in kinds if checkpoint.file(kind).name not in listed]
    return f"{STATE} lists no {', '.join(missing)}" if missing else None


def _fault(file: Path, facts: Any) -> str | None:
    if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
        return f"{STATE} has no size and checksum of {file.name}"
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{file.name} has {size} bytes instead of {facts['bytes']}"
    if sha256(file) != facts["sha256"]:
        return f"{file.name} does not match its checksum"
    return None


def superseded(names: Sequence[int], *, keep: int, keep_every: int | None) -> list[int]:
    """Which of a run's checkpoints, named by their clocks, are to be removed.

    The newest `keep` stay, and of the others the first at or after each multiple of `keep_every`.
    """
    ordered = sorted(names)
    return [
        images
        for before, images in zip([0, *ordered], ordered[:-keep], strict=False)
        if keep_every is None or images // keep_every == before // keep_every
    ]


def sha256(file: Path) -> str:
    """The checksum of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a published `.pt` file (never unpickling code).

    Raises:
        ValueError: the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such weights file: {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no weights file: {str(error).splitlines()[0]}") from None
    except Exception as error:  # torch raises pickle's own errors for unsafe or foreign files
        raise ValueError(f"{path} is no plain weights file: {type(error).__name__}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds {type(weights).__name__}, not a dict of tensors")
    return weights


def fill(net: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load `weights` into `net`, strictly.

    Raises:
        ValueError: as `check_fit`.
    """
    check_fit(net, weights, source=source)
    net.load_state_dict(dict(weights))


def check_fit(net: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Return if `weights` are those of such a network, which may be on the meta device.

    Raises:
        ValueError: names or shapes are not those of the network.
    """
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source} does not fit the network of this preset: {'; '.join(wrong[:3])}{more}"
        )


class Saver:
    """Writes a run's checkpoints. All ranks call `save`, and `commit` when all have agreed.

    `writing` says whether this rank's files of the last `save` are still on their way to disk,
    `error` why they will not get there. Between `save` and `commit` the training goes on.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        world: World,
        keep: int,
        keep_every: int | None = None,
        check_writer: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._check_writer = check_writer
        self._log = log
        self._mode = 0o666 & ~_umask()
        self._thread: threading.Thread | None = None
        self._state: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self.error: str | None = None

    @property
    def pending(self) -> bool:
        """A checkpoint was saved and is not committed yet."""
        return self._thread is not None

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, source: Gathered, *, images: int, state: Mapping[str, Any]) -> None:
        """Copy the state to the host, then write it in the background."""
        assert not self.pending, "commit the last checkpoint before the next save"
        self._state = {"images": images, **state}
        directory = self._partial(images)
        if self._world.is_main:
            self._check_writer()
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            self._remove(self._checkpoints.glob(".*.partial"))
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

    def commit(self) -> Path:
        """Name the checkpoint, once no rank is writing any more, and prune older ones.

        Raises:
            Broken: a rank could not write its files.
            ValueError: another start has taken the run over.
            What was committed before is untouched.
        """
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        everyone: list[Any] = [None] * self._world.size
        dist.all_gather_object(everyone, (self._facts, self.error))
        errors = [error for _, error in everyone if error]
        if errors:
            raise Broken(f"the checkpoint could not be written: {errors[0]}")
        images = self._state["images"]
        final = self._checkpoints / f"{images:012d}"
        if self._world.is_main:
            self._check_writer()
            files = {name: facts for part, _ in everyone for name, facts in part.items()}
            state = {**self._state, "files": files}
            _write_json(self._partial(images) / STATE, {**state, _SELF: _checksum(state)})
            if final.exists():  # this one was damaged, and an older one was resumed
                os.replace(final, _aside(final))
            os.replace(self._partial(images), final)
            _sync(self._checkpoints)
            self._prune()
        return final

    def _partial(self, images: int) -> Path:
        return self._checkpoints / f".{images:012d}.partial"

    def _write(self, directory: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._facts, self.error = {}, None
        try:
            for kind, tensors in files.items():
                file = directory / f"{kind}.safetensors"
                save_file(dict(tensors), file, metadata={"images": str(self._state["images"])})
                file.chmod(self._mode)  # safetensors lets nobody else read it
                _sync(file)
                self._facts[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        except Exception as error:  # whatever it is, this checkpoint must not be committed
            self.error = f"rank {self._world.rank}: {directory}: {type(error).__name__}: {error}"

    def _prune(self) -> None:
        names = [int(path.name) for path in committed(self._checkpoints)]
        old = superseded(names, keep=self._keep, keep_every=self._keep_every)
        self._remove(self._checkpoints / f"{images:012d}" for images in old)

    def _remove(self, directories: Iterable[Path]) -> None:
        """Remove directories and what earlier attempts left; a failure is logged and tried again.

        A directory is renamed first, so that one that is half removed does not look committed.
        """
        left = list(self._checkpoints.glob(f".*{_REMOVED}"))
        for path in [*left, *directories]:
            try:
                aside = path if path in left else path.rename(_aside(path))
                shutil.rmtree(aside)
            except OSError as error:
                self._log(f"cannot remove {path}: {error}; tried again at the next checkpoint")


def _owner(number: int, world: World) -> int:
    """The rank that writes file `number`: one node after the other, then their second ranks."""
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


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
