"""What a run records beside its checkpoints, written behind its steps.

Training goes on without these files where they cannot be written, and without waiting for a disk
that is slow, or that hangs for a while.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data import files

# The most rows of a file that wait for room on a full disk.
_WAITING = 10_000


class Records:
    """Writes a run's records in one thread, in the order in which they are given.

    What waits for a disk is bounded: each checkpoint waits for all of it. `check` raises where the
    run is not to be written any more; that, and any fault of a writer but OSError, is raised by the
    next call. `show` prints a line.
    """

    def __init__(
        self, run: Path, *, check: Callable[[], None], show: Callable[[str], None]
    ) -> None:
        self._run, self._check, self._show = run, check, show
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        self._fault: BaseException | None = None
        # What could not be written the last time.
        self._failing: set[str] = set()
        # Rows that had no room, by the name of their file.
        self._rows: dict[str, deque[str]] = {}

    def write(self, what: str, write: Callable[[], object]) -> None:
        """Write `what` behind the training; say so when it fails, and when it works again."""
        self._put(lambda: self._attempt(what, write))

    def add_row(self, name: str, row: str) -> None:
        """Append a row to a file; where there is no room it waits for the next row of any file."""
        self._put(lambda: self._add(name, row))

    def wait(self) -> None:
        """Wait until all is written."""
        self._thread.submit(int).result()

    def settle(self) -> None:
        """Wait until all is written, and raise the fault that a writer had."""
        self.wait()
        self._raise()

    def _put(self, act: Callable[[], None]) -> None:
        self._raise()
        self._thread.submit(self._do, act)

    def _do(self, act: Callable[[], None]) -> None:
        if self._fault is None:
            try:
                act()
            except BaseException as error:  # raised where the next record is given
                self._fault = error

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _attempt(self, what: str, write: Callable[[], object]) -> None:
        try:
            self._check()
            write()
        except OSError as error:
            if what not in self._failing:
                self._failing.add(what)
                why = files.reason(error)
                self._show(
                    f"cannot write {what} of {self._run}: {why}; training continues without it"
                )
        else:
            if what in self._failing:
                self._failing.remove(what)
                self._show(f"{what} of {self._run} is written again")

    def _add(self, name: str, row: str) -> None:
        self._rows.setdefault(name, deque(maxlen=_WAITING)).append(row)
        for file, rows in self._rows.items():
            if rows:
                self._attempt(file, partial(self._append, file, rows))

    def _append(self, name: str, rows: deque[str]) -> None:
        files.append(self._run / name, "".join(rows))
        rows.clear()
