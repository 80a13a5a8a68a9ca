"""What the project's commands accept: each is parsed by its own parser, and then not run."""

import argparse
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest

#: Every command with options of its own.
COMMANDS = (
    ("data.pack",), ("data.shards",),
    ("launch",), ("launch", "status"), ("launch", "stop"), ("launch", "sweep"),
    ("launch", "sample"), ("launch", "check"),
    ("trainer.train",), ("trainer.sample",), ("trainer.config",), ("trainer.plan",),
    ("trainer.ema",), ("trainer.export",), ("trainer.ablate",), ("trainer.preflight",),
    ("trainer.evaluate",), ("trainer.evaluate", "reference"), ("trainer.evaluate", "nll"),
    ("bench.gpu",), ("bench.data",), ("bench.overhead",), ("bench.cpu_step",), ("bench.photos",),
    ("bench.rehearsal",),
)  # fmt: skip


class _Parsed(BaseException):
    """A command has parsed its options, and would go on."""

    def __init__(self, parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
        self.parser, self.found = parser, found


@contextlib.contextmanager
def _only_parsed(*, words_count: bool) -> Iterator[None]:
    """Within it, a parser raises what it has read, or itself where its words do not count."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(
        self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None
    ) -> object:
        if not words_count:
            raise _Parsed(self, argparse.Namespace())
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_known_args", parse)
            found, rest = parse(self, args)
        if rest and self.prog != "python -m launch sample":
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        found.rest = rest
        raise _Parsed(self, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        yield


def parse(module: str, words: Sequence[str]) -> argparse.Namespace:
    """What the command reads from these words.

    Raises:
        SystemExit: it refuses them.
    """
    return _stopped(module, words, words_count=True).found


@cache
def options_of(module: str, *verb: str) -> frozenset[str]:
    """All options of a command."""
    return frozenset(_options(_stopped(module, verb, words_count=False).parser))


@cache
def all_options() -> frozenset[str]:
    return frozenset().union(*(options_of(*command) for command in COMMANDS))


def main_of(module: str) -> Callable[..., object]:
    """What `python -m module` calls."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main


def _stopped(module: str, words: Sequence[str], *, words_count: bool) -> _Parsed:
    main = main_of(module)
    takes_words = bool(inspect.signature(main).parameters)
    with _only_parsed(words_count=words_count), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module, *words])
        try:
            main(list(words)) if takes_words else main()
        except _Parsed as stopped:
            return stopped
    raise AssertionError(f"python -m {module} parses no options")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _options(each)
