"""Checkpoints: gathered from the ranks, written behind the training, committed by one rename.

`RUN/checkpoints/000002560000/` (the clock, in images) holds one safetensors file for each kind of
fp32 state (`model`, `ema-0.9999`, `adam-m`, `adam-v`), keyed by the reference's state-dict names,
and `state.json`: the clock, what is not a tensor, and the size and sha256 of every file. The files
are dealt to ranks, written by a thread from host copies, and the directory gets its name when all
ranks have agreed that all files are whole. Any world size and ZeRO stage loads any checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
_NAME = re.compile(r"\d{12}")


class Gathered(Protocol):
    """Sharded state that can be gathered by kind and name (the engine)."""

    kinds: tuple[str, ...]

    def gather(self, kind: str) -> Iterator[tuple[str, Tensor]]: ...


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
        ValueError: it has no readable state.json.
    """
    try:
        state = json.loads((path / STATE).read_text())
        return Checkpoint(path, {**state, "images": int(state["images"]), "files": state["files"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} has no readable state.json: {error!r}") from None


def latest_valid(checkpoints: Path, *, world: World) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    All ranks must call it; each reads its share of the files, and all get the same answer.
    """
    paths = [committed(checkpoints)] if world.is_main else [None]
    dist.broadcast_object_list(paths)
    passed_over: list[str] = []
    for path in paths[0] or []:
        fault = _agreed_fault(path, world=world)
        if fault is None:
            return read(path), passed_over
        passed_over.append(f"checkpoint {path.name} is damaged and was passed over: {fault}")
    return None, passed_over


def _agreed_fault(path: Path, *, world: World) -> str | None:
    try:
        files = sorted(read(path).state["files"].items())[world.rank :: world.size]
        mine = next((f for name, facts in files if (f := _fault(path / name, facts))), None)
    except ValueError as error:
        mine = str(error)
    faults: list[str | None] = [None] * world.size
    dist.all_gather_object(faults, mine)
    return next((fault for fault in faults if fault), None)


def _fault(file: Path, facts: Mapping[str, Any]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{file.name} has {size} bytes instead of {facts['bytes']}"
    if sha256(file) != facts["sha256"]:
        return f"{file.name} does not match its checksum"
    return None


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
    ) -> None:
        self._checkpoints = checkpoints
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._check_writer = check_writer
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
            for left_behind in self._checkpoints.glob(".*.partial"):
                shutil.rmtree(left_behind)
            directory.mkdir(parents=True)
        dist.barrier()
        mine: dict[str, dict[str, Tensor]] = {}
        for number, kind in enumerate(source.kinds):
            owner = _owner(number, self._world)
            for name, value in source.gather(kind):
                if owner == self._world.rank:
                    copy = value.detach().to("cpu", torch.float32, copy=True)
                    mine.setdefault(kind, {})[name] = copy.contiguous()
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
            _write_json(self._partial(images) / STATE, {**self._state, "files": files})
            if final.exists():  # this one was damaged, and an older one was resumed
                os.replace(final, self._checkpoints / f".{images:012d}.damaged.partial")
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
                _sync(file)
                self._facts[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        except Exception as error:  # whatever it is, this checkpoint must not be committed
            self.error = f"rank {self._world.rank}: {directory}: {type(error).__name__}: {error}"

    def _prune(self) -> None:
        every = self._keep_every
        for path in committed(self._checkpoints)[self._keep :]:
            if every is None or int(path.name) % every:
                shutil.rmtree(path)


def _owner(number: int, world: World) -> int:
    """The rank that writes file `number`: one node after the other, then their second ranks."""
    nodes = max(1, world.size // world.local_size)
    return (number % nodes * world.local_size + number // nodes) % world.size


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
