"""Writing files in full or not at all, also across a power cut; why a path cannot be used."""

import errno
import hashlib
import os
import pwd
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data import descriptors

# Errors that only writing raises; others may come from where the content is read.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The most bytes that the name of an output may have: unfinished files have a longer name.
_LONGEST = 255 - 16


@contextmanager
def whole(path: Path, *, writer: str = "partial") -> Iterator[BinaryIO]:
    """A file to write; it gets the name `path` once all of its content is on disk.

    Processes that may write the same file at the same time must give different `writer`s.
    """
    aside = path.with_name(f"{path.name}.{writer}")
    try:
        with _named(path), aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write(path: Path, content: bytes | str, *, writer: str = "partial") -> None:
    """Write a file in full, or leave the one that is there.

    A text may contain names of files that are no UTF-8; they are written byte for byte.
    """
    with whole(path, writer=writer) as file:
        file.write(_bytes(content))


def _bytes(content: bytes | str) -> bytes:
    return content.encode(errors="surrogateescape") if isinstance(content, str) else content


def make_parent(path: Path, *, option: str) -> None:
    """Make the directory of an output that the user named by `option`.

    Raises:
        ValueError: it cannot be made, nothing can be written there, or the name is too long.
    """
    check_name(path, option=option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if isinstance(error, PermissionError):
            check_parent(path, option=option)
        raise ValueError(
            f"{option} = {str(path)!r}: its directory cannot be made ({error.strerror})"
        ) from None
    check_parent(path, option=option)


def check_parent(path: Path, *, option: str) -> None:
    """As `make_parent`, but make nothing: a command that is refused later leaves no directory."""
    check_name(path, option=option)
    if fault := write_fault(path.parent):
        raise ValueError(f"{option} = {str(path)!r}: {fault}: name another {option}")


def check_name(path: Path, *, option: str) -> None:
    """Raise ValueError where the name of an output is too long."""
    if (length := len(os.fsencode(path.name))) > _LONGEST:
        raise ValueError(
            f"{option}: {path.name[:32]!r}... has {length} bytes: must be at most {_LONGEST}"
        )


def check_text(text: str, *, option: str) -> None:
    """Raise ValueError unless a path or setting is UTF-8, as safetensors and TOML need."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option} = {text!r}: must be UTF-8") from None


def check_link(path: Path) -> None:
    """Raise ValueError if a path is a link whose target is missing, such as an unmounted disk."""
    if fault := link_fault(path):
        raise ValueError(fault)


def link_fault(path: Path) -> str:
    """That a path is a link whose target is missing; "" for all others."""
    if path.is_symlink() and not os.path.exists(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist"
    return ""


def nearest(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def write_fault(directory: Path) -> str:
    """Why a directory, or its nearest parent that exists, cannot be written to; or ""."""
    place = nearest(directory)
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        denied, _ = _denied(place) if isinstance(error, PermissionError) else ("", "")
        return denied or f"{place} is not writable ({error.strerror})"


def look_again(directory: Path) -> Path:
    """Return the directory, after making this machine notice one that another has just made.

    A client of NFS may remember for a minute that it was missing. Making a directory asks the
    server; directories that this makes, because they really are missing, are removed again.
    """
    made = []
    for place in (*reversed(directory.absolute().parents), directory.absolute()):
        with suppress(OSError):
            place.mkdir()
            made.append(place)
    for place in reversed(made):
        with suppress(OSError):  # another process has put something there
            place.rmdir()
    return directory


def is_full(error: OSError) -> bool:
    """Whether a disk, or what this user may have of it, is full."""
    return error.errno in _FULL


def denial(path: Path) -> str:
    """Which right to a path this user lacks, and who can give it; "" if none is lacking."""
    denied, owner = _denied(path)
    return f"{denied}: let {owner} chmod it, or give another path" if denied else ""


def reason(error: Exception) -> str:
    """The message for an error: as `denial` for a file that the user may not read or write, as
    `data.descriptors.without_threads` where threads cannot be started.
    """
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return denial(Path(error.filename)) or str(error)
    if isinstance(error, NotADirectoryError) and isinstance(error.filename, str):
        path = Path(error.filename)
        file = next((each for each in (path, *path.parents) if each.is_file()), path)
        return f"{file} is a file where a directory is wanted: name another"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1:,} is not UTF-8: save the file in that encoding"
    return descriptors.without_threads(error) or str(error)


def _denied(path: Path) -> tuple[str, str]:
    """Which right to a path this user lacks, and the owner's name; "" and "" if none."""
    path = Path(os.path.realpath(path))  # the directories of a link's target count
    places = [(place, os.X_OK, "enter") for place in reversed(path.parents)]
    last = path if os.path.exists(path) else path.parent
    for place, right, what in (*places, (last, os.R_OK, "read"), (last, os.W_OK, "write")):
        if os.path.exists(place) and not os.access(place, right, effective_ids=True):
            found = place.stat()
            me, owner = _user(os.geteuid()), _user(found.st_uid)
            whose = f"which belongs to {owner} (mode {found.st_mode & 0o7777:o})"
            return f"user {me} may not {what} {place}, {whose}", owner
    return "", ""


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a container may have no name for it
        return str(number)


def touched(path: Path) -> int:
    """When a file was last written or touched, in ns by its file system's clock; 0 if missing.

    Opening the file makes a network file system ask the server.
    """
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def age(path: Path) -> float:
    """Seconds since a file was last written, by the clock of its file system.

    The clock of this machine may differ, or have been set since.
    """
    then, now = path.stat().st_mtime, time.time()
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as made:
        now = os.fstat(made.fileno()).st_mtime
    return now - then


def append(path: Path, content: bytes | str) -> None:
    """Append all of the content to a file, or nothing; the file is made if it is missing."""
    with _named(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        rest = memoryview(_bytes(content))
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, the error of a full disk names the file, which that of `write` does not."""
    try:
        yield
    except OSError as error:
        if is_full(error) and error.filename is None:
            error.filename = str(path)
        raise


def set_aside(path: Path, suffix: str) -> None:
    """Rename to `NAME.SUFFIX`, with the time appended if that exists."""
    to = path.with_name(f"{path.name}.{suffix}")
    path.rename(to if not to.exists() else f"{to}.{time.time_ns()}")


def sha256(path: Path) -> str:
    """The checksum of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems, such as SMB, cannot sync directories.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
