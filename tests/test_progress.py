"""The line that is drawn again and again is for a user's terminal alone."""

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from tests.support.ranks import ROOT, environment

WORK = [
    sys.executable,
    "-c",
    "from data.progress import Progress\n"
    "progress = Progress(total=4, shown=True)\n"
    "for _ in range(4): progress.advance()\n"
    "print('done')",
]


def printed(words: Sequence[str]) -> bytes:
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, check=True)
    return done.stdout


def test_progress_is_drawn_on_a_terminal_and_not_into_a_file() -> None:
    ours, theirs = pty.openpty()
    subprocess.run(WORK, cwd=ROOT, env=environment(), stdout=theirs, check=True)
    os.close(theirs)
    drawn = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # its end is an error
        while part := terminal.read(4096):
            drawn += part
    assert drawn.count(b"4 images") == 4
    assert printed(WORK) == b"done\n"


def test_the_terminal_that_mpirun_gives_rank_0_is_nobodys() -> None:
    said = printed(["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "1", *WORK])
    assert said.replace(b"\r", b"") == b"done\n"
