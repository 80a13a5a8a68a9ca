"""Files that are there in full or not at all, also after a power cut."""

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

# Errors of writing alone: another may come from what the content is read from.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Bytes of the longest name of an output: until it is whole, files beside it have longer ones.
_LONGEST = 255 - 16


@contextmanager
def whole(path: Path, *, writer: str = "partial") -> Iterator[BinaryIO]:
    """A file whose content gets the name `path` once all of it is on disk.

    Processes that may write the same file at once must give different names as `writer`.
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
    """Write a whole file, or leave the one that is there.

    Names of files in a text may be of any bytes: they are written as they are on disk.
    """
    with whole(path, writer=writer) as file:
        file.write(_bytes(content))


def _bytes(content: bytes | str) -> bytes:
    return content.encode(errors="surrogateescape") if isinstance(content, str) else content


def make_parent(path: Path, *, option: str) -> None:
    """Make the directory of an output, which a command was given by `option`.

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
    """As `make_parent`, which is left to who writes the output: a refused command leaves none."""
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
    """Raise ValueError where a path or a setting is no UTF-8, which safetensors and TOML need."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option} = {text!r}: must be UTF-8") from None


def check_link(path: Path) -> None:
    """Raise ValueError where a path is a link to nothing, such as a disk not mounted now."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist")


def nearest(path: Path) -> Path:
    """That path, or the nearest above it that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def write_fault(directory: Path) -> str:
    """Why nothing can be written in a directory, or in the nearest that exists above it; or ""."""
    place = nearest(directory)
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        denied, _ = _denied(place) if isinstance(error, PermissionError) else ("", "")
        return denied or f"{place} is not writable ({error.strerror})"


def look_again(directory: Path) -> Path:
    """That directory, seen also where another machine has made it a moment ago.

    A machine may hold for a minute that it was missing, as clients of NFS do. To make it asks the
    server; what is made so, where the directory is not to be seen here, is removed again.
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


def denial(path: Path) -> str:
    """What this user may not do with a path, and who can change that; or "", where it may all."""
    denied, owner = _denied(path)
    return f"{denied}: let {owner} chmod it, or give another path" if denied else ""


def reason(error: Exception) -> str:
    """An error in words: of a file that a user may not read or write, as `denial`, and of threads
    that cannot be started.
    """
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return denial(Path(error.filename)) or str(error)
    return descriptors.without_threads(error) or str(error)


def _denied(path: Path) -> tuple[str, str]:
    """What this user may not do with a path, and who owns it; nothing, where it may all."""
    path = path.absolute()
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
    """When a file was last written or touched, in ns by its file system's clock; 0 without one.

    Opening the file makes a network file system look afresh.
    """
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def age(path: Path) -> float:
    """Seconds since a file was last written, by the clock of its file system.

    That of this machine may differ from a file server's, or have been set since.
    """
    then, now = path.stat().st_mtime, time.time()
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as made:
        now = os.fstat(made.fileno()).st_mtime
    return now - then


def append(path: Path, content: bytes | str) -> None:
    """Append to a file, made if it is missing, all of the content or none of it; as `write`."""
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
    """While entered, the error of a full disk names the file: that of `write` names none."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise


def set_aside(path: Path, suffix: str) -> None:
    """Rename to `NAME.SUFFIX`, or where that is there to a name of its own."""
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
        # Some network file systems, such as SMB's, have no such call for directories.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
