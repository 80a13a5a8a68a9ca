"""Where what is compiled here is kept: DeepSpeed's operator, Triton's and Inductor's kernels.

No torch here: `python -m trainer.preflight` works without it.
"""

import getpass
import os
import tempfile
from pathlib import Path

from data import files

OPERATORS, TRITON, INDUCTOR = "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"


def directory(variable: str) -> Path:
    """The directory that this environment variable names, or that is meant where it is not set."""
    if named := os.environ.get(variable):
        return Path(named)
    if variable == OPERATORS:
        own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(own) / "torch_extensions"
    # Triton's own would be in the home directory, which nodes share.
    name = f"triton-{os.getuid()}" if variable == TRITON else f"torchinductor_{_user()}"
    return Path(tempfile.gettempdir()) / name


def fault(variable: str) -> str:
    """Why nothing can be kept there, or loaded from there, with the way out; or ""."""
    place, wanted = directory(variable), "writable"
    why = files.write_fault(place)
    if place.parts[0] == "~" and not os.environ.get(variable):
        why = f"user {_user()} has no home directory (HOME is not set)"
    if not why and os.statvfs(files.nearest(place)).f_flag & os.ST_NOEXEC:
        why = f"{place} is on a disk that is mounted noexec, from which no library is loaded"
        wanted = "on another disk"
    return f"{why}: set {variable} to a directory that is {wanted}" if why else ""


def check(*variables: str) -> None:
    """Raise ValueError where one of these directories has a `fault`."""
    for variable in variables:
        if said := fault(variable):
            raise ValueError(said)


def made_fault() -> str:
    """Why torch cannot make Inductor's directory, which it does with the first network, on CPUs
    too, whether or not anything is compiled; or "".
    """
    place = directory(INDUCTOR)
    why = "" if place.is_dir() else files.write_fault(place)
    return f"{why}: set {INDUCTOR} to a directory that is writable" if why else ""


def check_made() -> None:
    """Raise ValueError where there is a `made_fault`."""
    if said := made_fault():
        raise ValueError(said)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return f"uid_{os.getuid()}"
