"""Every setting of a preset as a page: `python -m trainer.config.describe > docs/settings.md`.

Names, types and defaults are those of the dataclasses, meanings their comments (`#:`) and
docstrings, so that the page cannot be wrong where it is current; a test compares it. No torch.
"""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from data.exits import CommandParser, reported
from trainer.adm.config import ClassifierConfig, UNetConfig
from trainer.config import settings
from trainer.config.experiment import Config, toml_value

_HEAD = """\
# Settings

Made by `python -m trainer.config.describe`; a test keeps it current. A preset
(`trainer/presets/*.toml`) has these sections; `--set 'training.lr = 1e-4'` changes a setting,
`--unset training.clip` leaves one out, and `python -m trainer.config PRESET` prints all of them.
A setting without a default must be in the preset.
"""


def page() -> Iterator[str]:
    """The lines of the page."""
    yield _HEAD
    for title, kind in _sections():
        yield f"## {title}\n"
        for ancestor in reversed(kind.__mro__[:-1]):
            yield f"{inspect.getdoc(ancestor)}\n"
        yield "| setting | type | default | |\n|---|---|---|---|"
        yield from _rows(kind)
        yield ""


def _sections() -> Iterator[tuple[str, type]]:
    """The title and the dataclass of every section."""
    for name, hint in typing.get_type_hints(Config).items():
        if name == "model":
            yield '[model], with `objective = "denoise"`', UNetConfig
            yield '[model], with `objective = "classify"`', ClassifierConfig
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield f"[{name}]", hint


def _rows(kind: type) -> Iterator[str]:
    hints, said = typing.get_type_hints(kind), _comments(kind)
    for field in settings.fields(kind):
        default = "absent" if field.default is None else f"`{toml_value(field.default)}`"
        if field.default is dataclasses.MISSING:
            default = ""
        comment = said.get(field.name, "").replace("|", "\\|")
        yield f"| `{field.name}` | {_type(hints[field.name])} | {default} | {comment} |"


def _comments(kind: type) -> dict[str, str]:
    """The comment above each field, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__[:-1]):
        lines: list[str] = []
        for line in inspect.getsource(ancestor).splitlines():
            text = line.strip()
            if text.startswith("#:"):
                lines.append(text.removeprefix("#:").strip())
            elif lines and ":" in text:
                found[text.partition(":")[0]] = " ".join(lines)
                lines = []
    return found


def _type(hint: Any) -> str:
    """A type as the writer of a TOML file knows it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}s"
    names = {str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(hint, str(hint))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page."""
    about = "Print every setting of a preset, with its type, default and meaning, as a page."
    CommandParser(prog="python -m trainer.config.describe", description=about).parse_args(argv)
    return reported(_print)


def _print() -> int:
    sys.stdout.write("\n".join(page()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
