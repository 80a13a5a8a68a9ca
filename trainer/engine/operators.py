"""The operator that DeepSpeed compiles for CPUs at the first start: its tools and its locks."""

import fcntl
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch

from data import files
from data.progress import duration
from trainer.engine import caches


def prepare() -> None:
    """Let DeepSpeed compile its operator for CPUs, or load it.

    Raises:
        ValueError: there is no ninja, the directory of operators has a `caches.fault`, or as for
            `check_accelerator`.
    """
    check_accelerator()
    if torch.cuda.is_available():
        return
    _find_ninja()
    caches.check(caches.OPERATORS)


def check_accelerator() -> None:
    """Raise ValueError where DeepSpeed is told to compute on something else than torch."""
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if (named := os.environ.get("DS_ACCELERATOR", own)) != own:
        raise ValueError(
            f"DS_ACCELERATOR = {named!r}, a variable of the environment: must be {own!r} on this "
            "machine, or unset"
        )


def _find_ninja() -> None:
    """Put ninja in PATH.

    In an environment that is not activated it lies beside the interpreter, and PATH has none.
    """
    if shutil.which("ninja"):
        return
    beside = Path(sys.executable).parent
    if shutil.which("ninja", path=str(beside)) is None:
        raise ValueError(
            "no ninja in PATH, by which DeepSpeed compiles its operator for CPUs: pip install "
            "ninja (`python -m trainer.preflight` checks this machine)"
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(beside)])


def locks() -> list[str]:
    """What is to be said of the lock of that operator, for which a start waits. GPUs need none.

    Until torch 2.13 the file is the lock, and outlives its maker; since 2.14 the system locks it,
    and it stays.

    Raises:
        ValueError: the file is the lock, and older than an hour, so that nothing is compiling.
    """
    if torch.cuda.is_available() or not (found := _compiled("lock")):
        return []
    from torch.utils import cpp_extension  # takes a second, which DeepSpeed takes anyway

    said = []
    for lock in found:
        with suppress(FileNotFoundError):  # it was released just now
            if not hasattr(cpp_extension, "FileBaton"):
                if _is_locked(lock):
                    said.append(
                        f"{lock} is held by a process that compiles; this start waits for it"
                    )
                continue
            age = files.age(lock)
            made = f"{lock} was made {duration(age)} ago by a process that compiles"
            if age > 3600.0:
                raise ValueError(f"{made}, and was killed meanwhile: delete it")
            said.append(f"{made}; this start waits for it. If nothing compiles there, delete it")
    return said


def _is_locked(path: Path) -> bool:
    """Whether a process holds the file's lock now."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # a file system may have no locks
            return isinstance(error, BlockingIOError)
    return False


def explained(error: RuntimeError | ImportError | OSError) -> OSError:
    """The error where it could not be compiled or loaded, with the way out."""
    if not isinstance(error, OSError):
        return OSError(_fault(error))
    if not files.is_full(error):
        return error
    place, variable = caches.directory(caches.OPERATORS), caches.OPERATORS
    return OSError(f"{place}: {error.strerror}: set {variable} to a directory with room")


def _fault(error: RuntimeError | ImportError) -> str:
    """Why it could not be compiled or loaded.

    Ninja compares sources and options alone: not the processor, nor the versions of torch and of
    the system's libraries. Of an operator for another processor, the system says that there is no
    such file.
    """
    if isinstance(error, ImportError) and (found := _compiled("*.so")):
        return (
            f"DeepSpeed's operator for CPUs cannot be loaded: {error}: it was compiled on another "
            f"kind of machine or for another torch: delete {found[0].parent}, or set "
            f"{caches.OPERATORS} to a directory of this kind of machine's own"
        )
    # The first error among the lines of the compiler, if any.
    lines = str(error).splitlines() or [type(error).__name__]
    why = next((line for line in lines if re.search("error: |not found", line)), lines[0][:120])
    return (
        f"DeepSpeed's operator for CPUs cannot be compiled: {why} "
        "(`python -m trainer.preflight` checks the compiler)"
    )


def notice() -> list[str]:
    """What is to be said where DeepSpeed has yet to compile its operator for CPUs."""
    if torch.cuda.is_available() or _compiled("*.so"):
        return []
    return ["DeepSpeed compiles its operator for CPUs, once on this machine: up to some minutes"]


def _compiled(names: str) -> list[Path]:
    """The files of these names where torch compiles the operator."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    above = "" if os.environ.get(caches.OPERATORS) else f"{python}_*/"
    return sorted(caches.directory(caches.OPERATORS).glob(f"{above}deepspeed_shm_comm/{names}"))
