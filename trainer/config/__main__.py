"""`python -m trainer.config PRESET [--set ...]`: print it resolved, or what is wrong."""

import argparse
import sys
from collections.abc import Sequence

from data.exits import CommandParser, reported
from trainer.adm.config import check
from trainer.config import experiment as configs
from trainer.config import flags, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Print the resolved preset; returns the exit status."""
    parser = CommandParser(
        prog="python -m trainer.config",
        description="Print a preset with all its settings, or the error in it.",
    )
    parser.add_argument("preset", nargs="?", help="a name in trainer/presets, or a .toml file")
    meant = "print the preset that these flags of guided-diffusion mean (default: PRESET)"
    parser.add_argument("--from-flags", metavar='"--image_size 64 ..."', help=meant)
    settings.add_overrides(parser)
    parser.add_argument(
        "--ranks", type=int, help="also check the batch on so many ranks (default: unchecked)"
    )
    arguments = parser.parse_args(argv)
    if (arguments.preset is None) == (arguments.from_flags is None):
        parser.error("give PRESET or --from-flags")
    return reported(lambda: _print(arguments))


def _print(arguments: argparse.Namespace) -> int:
    ranks = arguments.ranks
    check(ranks is None or ranks >= 1, "--ranks", ranks, "at least 1")
    if arguments.from_flags is not None:
        for name, value in {"--set": arguments.set, "--unset": arguments.unset}.items():
            check(not value, name, value, "absent with --from-flags: change what it prints")
        print(flags.to_preset(arguments.from_flags, ranks=ranks), end="")
        return 0
    config = configs.load(arguments.preset, arguments.set, unset=arguments.unset)
    if ranks is not None:
        config.training.micro_batch_on(ranks)
    print(configs.to_toml(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
