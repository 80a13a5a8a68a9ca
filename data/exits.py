"""Exit statuses of all commands: whether to run a command again, or to correct it first.

0 is success, also of a start that finds a request to stop the run. The others are those of
sysexits.h, since launchers use small numbers for themselves (srun ends with 2 where a node has no
such program).
"""

import argparse
import codecs
import difflib
import dis
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from data import descriptors, files
from data.config import is_local, shown
from data.stores import FINAL
from data.version import version

# A fault of the machine (a full disk, a lost rank, a killed worker): run the command again.
FAILED = 1
# A training run that saved and left early: run the command again to resume (EX_TEMPFAIL).
TO_BE_CONTINUED = 75
# A user error (a wrong option, a missing or damaged input): correct it first (EX_CONFIG).
REFUSED = 78

_ROOT = Path(__file__).resolve().parent.parent

# Errors that a command reports in one line; any other is a bug and shows its traceback.
REPORTED = (ValueError, ImportError, OSError, BrokenExecutor)


class CommandParser(argparse.ArgumentParser):
    """The parser of all commands: a wrong option is a user error, and there is `--version`.

    Descriptions keep their line breaks. An empty path, as an unset variable gives, is refused.
    """

    def __init__(self, **options: Any) -> None:
        open_streams()
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper) and (errors := errors_for(out)) != out.errors:
            out.reconfigure(errors=errors)
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.register("type", Path, lambda text: Path(path_text(text)))
        self.add_argument(
            "--version",
            action=_Version,
            nargs=0,
            dest=argparse.SUPPRESS,  # it is no value among the parsed options
            default=argparse.SUPPRESS,
            help="print the version, and the commit of a git checkout, and exit",
        )

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with `REFUSED`."""
        self.print_usage(sys.stderr)
        unknown = re.match("unrecognized arguments: (--[^ =]+|[^ =]+(?==))", message)
        hint = self._instead_of(unknown[1]) if unknown else ""
        self.exit(REFUSED, f"{self.prog}: error: {message}{hint}\n")

    def _instead_of(self, option: str) -> str:
        options = self._option_string_actions
        if "--set" in options and "." in option:
            return f" (a setting: --set '{option.removeprefix('--')} = VALUE', as in the file)"
        close = difflib.get_close_matches(option, options, n=1)
        return f" (nearest: {close[0]})" if close else ""


def place_text(text: str) -> str:
    """The path, pattern or URL given to an option, unchanged.

    Raises:
        argparse.ArgumentTypeError: it is empty, which would mean the working directory.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path: is a variable empty?")
    return text


def path_text(text: str) -> str:
    """As `place_text`, for a path only; every `type=Path` is checked by it.

    Raises:
        argparse.ArgumentTypeError: also a URL or command, or a ~ that the shell did not replace.
    """
    place_text(text)
    if not is_local(text):
        raise argparse.ArgumentTypeError(
            f"{shown(text)!r} is no path on this machine: give one, and copy the files separately"
        )
    if text.partition("/")[0].startswith("~") and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r}: the shell replaces ~ only at the beginning of a word: write a space in "
            "place of =, or the whole path"
        )
    return text


class _Version(argparse.Action):
    """Prints the version, which is read only then, since it asks git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"adm-trainer {version()}")
        parser.exit()


def open_streams() -> None:
    """Open stdout and stderr to /dev/null where this process was started with them closed.

    Otherwise the next file that is opened would get their number, and what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115


def errors_for(stream: io.TextIOWrapper) -> str:
    """The error handler with which a stream can print any text.

    Names of files and classes may be any bytes, or have letters that the locale lacks. In the C
    locale, Python writes such bytes as they are and fails at such letters.
    """
    is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
    fails = stream.errors == "strict" or (stream.errors == "surrogateescape" and not is_utf8)
    return "backslashreplace" if fails else str(stream.errors)


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` statement of this project raised `error`.

    An error that a library or Python raised may be a bug, and needs its traceback.
    """
    trace = error.__traceback__
    if trace is None:
        return True  # it was never raised here, such as one that a worker sent
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    inside = Path(code.co_filename).resolve().is_relative_to(_ROOT)
    raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return inside and raised and ".venv" not in Path(code.co_filename).parts


def exit_status(error: BaseException) -> int:
    """The exit status of a command that `error` stopped.

    A missing path, or one of the wrong kind, too long or without permission, is a user error;
    every other `OSError` is a fault of the machine.
    """
    is_path = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    is_users = is_path or isinstance(error, (ValueError, ImportError, *FINAL))
    return REFUSED if is_users else FAILED


def reported(command: Callable[[], int]) -> int:
    """The exit status of a command; an error of `REPORTED`, and Ctrl-C, is printed in one line.

    If the reader of its output has ended, such as `head`, it is the status of SIGPIPE.
    """
    try:
        with interruptible():
            status = command()
            sys.stdout.flush()
    except (*REPORTED, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return 128 + signal.SIGPIPE
        if not (isinstance(error, REPORTED) or descriptors.without_threads(error)):
            raise
        print(f"error: {files.reason(error)}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; outside, it ends the command silently.

    Another handler of the signal, or ignoring it as under nohup, stays.
    """
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, before)


def _is_unread() -> bool:
    """Whether the reader of the output has ended; what is left to print is then dropped."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    is_unread = any(events & select.POLLERR for _, events in poll.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return is_unread
