"""What a rank prints may get lost; it never ends training.

The terminal of a run is closed, its ssh connection drops, the disk of its output is full: then
writing to stdout fails.
"""

import io
import sys
from typing import Any


class _Lossy(io.FileIO):
    """A file descriptor that accepts everything; what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data))


def tolerate_loss() -> None:
    """Let stdout and stderr of this process drop what they cannot write."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        before.flush()
        raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
        stream = io.TextIOWrapper(raw, encoding=before.encoding, errors=before.errors)
        stream.reconfigure(line_buffering=number == 2 or before.line_buffering)
        setattr(sys, name, stream)
