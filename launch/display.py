"""`python -m launch status`: the status of runs as text, as JSON, or refreshed in a terminal."""

import json
import math
import shutil
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data import files
from data.progress import duration
from launch import status
from launch.signs import Signs
from launch.status import Status


def render(found: Status, *, width: int = 80) -> str:
    """A run in six to eight rows, or drawing in three to five, wrapped at `width` characters."""
    seen = f"{found.images_seen:,}"
    if found.total:
        seen += f" of {found.total:,} ({100 * found.images_seen / found.total:.1f} %)"
    rate = f"{found.rate:.1f} images/s" if found.rate and found.is_running else ""
    scale = "" if found.loss_scale in (None, 1.0) else f"loss scale {found.loss_scale:g}"
    age = "" if found.age is None else f"{duration(found.age)} ago"
    restarts = "" if found.restarts is None else f"{found.restarts} restarts"
    training = [
        _row("images", seen, rate, found.left),
        _row("loss", _loss(found.loss), scale, age),
        _row("saved", found.checkpoint or "nothing yet", restarts),
    ]
    rows = [
        _name(found.name, width=width),
        *([] if found.is_sampling else training),
        _row("job", found.job),
        _row("health", found.health),
    ]
    if found.goodput:
        rows.append(_row("time", str(found.goodput)))
    if found.event:
        rows.append(_row("event", found.event))
    return "\n".join(_wrapped(row, width=width) for row in rows) + "\n"


def _wrapped(row: str, *, width: int) -> str:
    """A row on as many lines as it takes: a message ends with the way out."""
    return textwrap.fill(
        row,
        width=max(width - 1, 40),
        subsequent_indent=" " * len(_row("")),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _name(name: str, *, width: int) -> str:
    return name if len(name) < width else "..." + name[4 - width :]


def _loss(loss: float | None) -> str:
    if loss is None:
        return "none yet"
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def _row(name: str, *facts: str) -> str:
    return f"  {name:7} {', '.join(fact for fact in facts if fact)}"


def look(runs: Iterable[Path], *, signs: Signs) -> dict[Path, Status | str]:
    """The status of each run, or why it has none."""
    found: dict[Path, Status | str] = dict.fromkeys(runs, "")
    signs.look(found)
    for run in found:
        try:
            found[run] = status.read(run, signs=signs)
        except (OSError, ValueError) as error:
            found[run] = files.reason(error)
    return found


def text(found: Mapping[Path, Status | str], *, width: int = 80) -> str:
    """All of them, with an empty line between. One that cannot be read hides no other."""
    parts = []
    for run, each in found.items():
        fault = f"{_name(str(run), width=width)}\n  error   {each}\n"
        parts.append(fault if isinstance(each, str) else render(each, width=width))
    return "\n".join(parts)


def as_json(found: Mapping[Path, Status | str]) -> str:
    """A JSON list with an object for each run: the fields of `Status`, or `name` and `error`.

    A number that is not finite is null.
    """
    rows: list[dict[str, object]] = []
    for run, each in found.items():
        if isinstance(each, str):
            rows.append({"name": str(run), "error": each})
        else:
            advised = each.goodput.advised_interval if each.goodput else None
            more = {"seconds_left": each.seconds_left, "advised_checkpoint_seconds": advised}
            rows.append({**asdict(each), **more})
    finite = [{k: _finite(v) for k, v in row.items()} for row in rows]
    return json.dumps(finite, indent=1) + "\n"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def watch(runs: Sequence[Path]) -> None:
    """Show the status every 2 seconds, until Ctrl-C."""
    signs = Signs()
    try:
        while True:
            width = shutil.get_terminal_size().columns
            shown = text(look(runs, signs=signs), width=width)
            print(f"\x1b[H\x1b[2J{time.strftime('%H:%M:%S')}\n{shown}", end="", flush=True)
            time.sleep(2.0)
    except KeyboardInterrupt:
        print()
