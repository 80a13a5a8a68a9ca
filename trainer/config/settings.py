"""Settings: a TOML file and the command line's changes to it become frozen dataclasses.

The one reader, for presets and cluster files. What is wrong raises ValueError naming the setting,
its value and what it must be. No torch here: a login node reads settings too.
"""

import argparse
import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from data import files
from data.config import shown
from trainer.adm.config import check_choice

Table = dict[str, Any]


def add_overrides(
    parser: argparse.ArgumentParser,
    *,
    example: str = "training.lr = 1e-4",
    left: str = "training.clip",
) -> None:
    """The options by which every command changes settings of its file, such as a preset."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar=f"'{example}'",
        help="change a setting, written as in the file; may be repeated (default: none)",
    )
    parser.add_argument(
        "--unset",
        action="append",
        default=[],
        metavar=left,
        help="leave a setting out; may be repeated (default: none)",
    )


def words(overrides: Iterable[str], unset: Iterable[str]) -> list[str]:
    """The options of `add_overrides` that make these changes."""
    given = [("--set", change) for change in overrides] + [("--unset", name) for name in unset]
    return [word for option in given for word in option]


def find(name: str | Path, *, directory: Path, kind: str = "preset") -> Path:
    """The file that `name` means: a path that ends in .toml, or that of a `kind` in `directory`."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
        return path
    names = sorted(p.stem for p in directory.glob("*.toml"))
    if str(name) not in names:
        own = path.with_name(f"{path.name}.toml")
        hint = f" (nearest: {str(own)!r})" if own.is_file() else nearest(str(name), names)
        raise ValueError(
            f"unknown {kind} {str(name)!r}{hint}; there are: {', '.join(names)}; a file of your "
            "own ends in .toml"
        )
    return directory / f"{name}.toml"


def read(path: Path, *, overrides: Iterable[str] = (), unset: Iterable[str] = ()) -> Table:
    """The table of a TOML file, with the changes of `--set` and `--unset`.

    Raises:
        ValueError: the file or a change is unreadable, or two changes are of the same setting; or
            a setting to leave out is not there or is set by a change.
    """
    try:
        # TOML is UTF-8 whatever the locale; editors on Windows put a mark before it.
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {files.reason(error)}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid: its values are nested too deeply") from None
    changes = [_parse_change(change) for change in overrides]
    names = [name for change in changes for name in leaves(change)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is set more than once on the command line: give one value")
    for change in changes:
        _merge(table, change, path=())
    for name in unset:
        if any(is_in(each, name) for each in names):
            raise ValueError(f"--unset {name}: --set sets it, too; give one of them")
        _remove(table, name)
    return table


def without(changes: Iterable[str], later: Iterable[str]) -> tuple[str, ...]:
    """The changes, but for those of which `later` changes every setting."""
    changed = {name for change in later for name in leaves(_parse_change(change))}
    return tuple(c for c in changes if not changed.issuperset(leaves(_parse_change(c))))


def fields(kind: Any, *, derived: bool = False) -> list["dataclasses.Field[Any]"]:
    """The fields of a dataclass that can be set, or else those that are `derived` from others.

    The metadata of such a field has the name of the setting that it `follows`. `instead_of` has the
    names by which other programs set the same.
    """
    return [f for f in dataclasses.fields(kind) if ("follows" in f.metadata) is derived]


def build(kind: Any, table: Mapping[str, Any], *, name: str = "") -> Any:
    """An instance of dataclass `kind` from a table; its keys and types must be the class's own.

    `name` is the section that the table is.

    Raises:
        ValueError: a setting is unknown, missing, of another type, or out of its range.
    """
    hints = typing.get_type_hints(kind)
    every = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in every:
            known = {f.name: f.name for f in fields(kind)}
            others = {o: f.name for f in fields(kind) for o in f.metadata.get("instead_of", ())}
            hint = _in_section(kind, key) or nearest(key, others | known)
            hint = hint or f"; there are: {', '.join(known)}"
            raise ValueError(f"unknown setting {join(name, key)!r}{hint}")
    for key, field in every.items():
        if key not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"setting {join(name, key)!r} is missing")
    return kind(**{k: _convert(hints[k], v, name=join(name, k)) for k, v in table.items()})


def from_json(kind: Any, text: str) -> Any:
    """An instance of dataclass `kind` from JSON that a program wrote; ValueError as `build`.

    There null is absent, and what only a later release knows is passed over.
    """
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"{table!r:.80}: must be an object")
    known = {field.name for field in dataclasses.fields(kind)}
    return build(kind, {k: v for k, v in table.items() if k in known and v is not None})


def join(section: str, key: str) -> str:
    """The dotted name of a setting."""
    return f"{section}.{key}" if section else key


def leaves(table: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The values in a table and in the tables within it, by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = join(section, key)
        found |= leaves(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries that differ, as name -> (before, after), with None for one that is absent."""
    return {
        name: (before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }


def is_in(name: str, part: str) -> bool:
    """Whether a dotted name is `part`, or within it."""
    return name == part or name.startswith(f"{part}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like `word`, or nothing.

    In a mapping, it is a hint at what the most alike word stands for.
    """
    meant = known if isinstance(known, Mapping) else {name: name for name in known}
    by_lower = {name.lower(): name for name in meant}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (nearest: {meant[by_lower[close[0]]]!r})" if close else ""


def _in_section(kind: Any, key: str) -> str:
    """A hint at the section of `kind` that has a setting of this name, or nothing."""
    for section, hint in typing.get_type_hints(kind).items():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner) and key in {f.name for f in fields(inner)}:
                return f" (nearest: {join(section, key)!r}, in [{section}])"
    return ""


def _convert(hint: Any, value: Any, *, name: str) -> Any:
    """`value` as type `hint`, losslessly: an int may stand for a float, a list for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return _convert(inner, value, name=name)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} = {value!r}: must be a section, [{name}]")
        return build(hint, value, name=name)
    if origin is Literal:
        check_choice(name, value, hint)
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], v, name=f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(value, Mapping) and _is_mapping(origin):
        return {key: _convert(arguments[1], v, name=join(name, key)) for key, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} = {value!r}: must be {_said(hint)}")
    return value


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _said(hint: Any) -> str:
    """A type as the writer of a TOML file knows it."""
    origin = typing.get_origin(hint)
    if _is_mapping(origin):
        return "a table of strings"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return "a list" if origin is tuple else names[hint]


def _parse_change(text: str) -> Table:
    files.check_text(text, option="--set")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        name, _, value = (part.strip() for part in text.partition("="))
        is_bare = re.fullmatch(r"[\w./:~ -]+", value)
        change = f'{name} = "{value}"' if is_bare else 'training.precision = "bf16"'
        raise ValueError(
            f"--set {shown(text)!r:.80} is not TOML; write it as in the file: "
            f"--set 'training.lr = 1e-4', and text in quotes: --set '{change}'; to leave a "
            "setting out: --unset NAME"
        ) from None


def _merge(table: Table, change: Mapping[str, Any], *, path: tuple[str, ...]) -> None:
    for key, value in change.items():
        if isinstance(value, Mapping):
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set: {'.'.join((*path, key))} is a value, not a section")
            _merge(inner, value, path=(*path, key))
        else:
            table[key] = value


def _remove(table: Table, name: str) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = table.get(section)
        table = inner if isinstance(inner, dict) else {}
    if key not in table:
        known = [".".join([*sections, k]) for k in table]
        inside = [join(s, key) for s, v in table.items() if isinstance(v, dict) and key in v]
        hint = f" (nearest: {inside[0]!r})" if inside else nearest(name, known)
        raise ValueError(f"--unset {name}: the preset has no such setting{hint}")
    del table[key]
