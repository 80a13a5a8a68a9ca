"""`python -m trainer.ema RUN --sigma 0.075`: an average of any width, made after training.

It is a sum of the snapshots in RUN/averages, read one at a time (Karras et al. 2023). Without
--sigma, the widths that can be made of them are listed with their expected errors.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data import files
from data.exits import CommandParser, reported
from data.progress import duration, on_terminal
from trainer import snapshots, weights
from trainer.adm.config import check
from trainer.adm.ema import WIDEST, Profile, combine
from trainer.engine import averages
from trainer.run.runstate import committed
from trainer.snapshots import Snapshot

# The widths that are listed.
_LISTED = (0.02, 0.03, 0.05, 0.075, 0.1, 0.13, 0.15, 0.2, 0.25)
# Files with smaller coefficients are not read: they would change nothing.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Stored:
    """One average on disk: a file of a snapshot."""

    path: Path
    sha256: str
    profile: Profile

    def load(self) -> dict[str, Tensor]:
        """Its tensors, in the precision in which they are stored.

        Raises:
            ValueError: it is damaged.
        """
        without = f"move {self.path.parent} away and repeat the command to do without it"
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise ValueError("it does not match its checksum")
            return load(content)
        except PermissionError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{self.path} is damaged: {error}; {without}") from None


def find(run: Path, *, at: int | None) -> tuple[Snapshot, list[Stored]]:
    """The snapshot of a run at the clock `at`, by default the last; and all files up to there.

    Raises:
        ValueError: there are none, one cannot be read, or none is of that clock.
    """
    if not run.is_dir():
        raise ValueError(f"no such run: {run}")
    found = [Snapshot.read(path) for path in reversed(committed(snapshots.directory(run)))]
    if not found:
        raise ValueError(
            f"{run} has no snapshots of averages: train with training.ema_widths = [0.05, 0.1] "
            "and intervals.averages"
        )
    times = [snapshot.images_seen for snapshot in found]
    if at is not None and at not in times:
        nearest = sorted(times, key=lambda time: abs(time - at))[:3]
        such = " or ".join(map(str, sorted(nearest)))
        raise ValueError(f"--at = {at}: must be the time of a snapshot, such as {such}")
    used = found if at is None else found[: times.index(at) + 1]
    stored = [
        Stored(snapshot.path / name, facts["sha256"], snapshot.profile(name))
        for snapshot in used
        for name, facts in sorted(snapshot.files.items())
    ]
    # Where all steps between two snapshots were skipped, both hold the same averages.
    different = {file.profile: file for file in stored}
    return used[-1], list(different.values())


def build(
    stored: Sequence[Stored], coefficients: Mapping[float, Sequence[float]]
) -> dict[float, dict[str, Tensor]]:
    """The averages of several widths, by width and name, in fp32: sums of `coefficients` x files.

    All are made in one pass over the files.

    Raises:
        ValueError: a file is damaged, or of another network than the others.
    """
    totals: dict[float, dict[str, Tensor]] = {width: {} for width in coefficients}
    used = [
        i
        for i in range(len(stored))
        if any(abs(each[i]) > _NEGLIGIBLE for each in coefficients.values())
    ]
    began = time.monotonic()
    for done, i in enumerate(used, start=1):
        tensors = stored[i].load()
        for width, total in totals.items():
            _add(total, tensors, factor=coefficients[width][i], source=stored[i].path)
        each = (time.monotonic() - began) / done
        left = duration(each * (len(used) - done))
        end = "\n" if done == len(used) or not on_terminal() else "\r"
        print(f"file {done} of {len(used)}, {each:.1f} s each, {left} left", end=end, flush=True)
    return totals


def _add(
    total: dict[str, Tensor], tensors: Mapping[str, Tensor], *, factor: float, source: Path
) -> None:
    if total and {k: v.shape for k, v in total.items()} != {k: v.shape for k, v in tensors.items()}:
        raise ValueError(f"{source} holds another network than the snapshots before")
    for name, value in tensors.items():
        if name in total:
            total[name].add_(value.float(), alpha=factor)
        else:
            total[name] = value.float() * factor


def make(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status.

    Raises:
        ValueError: an option or a snapshot is wrong.
    """
    run, widths = arguments.run, tuple(dict.fromkeys(arguments.sigma or _LISTED))
    for width in widths:
        check(0.005 <= width < WIDEST, "--sigma", width, f"from 0.005 to below {WIDEST:.4f}")
    out: Path | None = arguments.out
    if out is not None:
        check(out.suffix == ".safetensors", "--out", str(out), "a file that ends in .safetensors")
        check(len(arguments.sigma or ()) == 1, "--out", str(out), "absent unless one --sigma is")
        check(not out.exists(), "--out", str(out), "a name that does not exist yet")
    last, stored = find(run, at=arguments.at)
    profiles = [file.profile for file in stored]
    kept = ", ".join(f"{width:g}" for width in sorted({profile.width for profile in profiles}))
    print(f"{run}: {len(stored)} averages of the widths {kept}, up to image {last.images_seen:,}")
    wanted = {width: Profile(last.updated_at, width) for width in widths}
    combinations = {width: combine(profiles, wanted=wanted[width]) for width in widths}
    for width, combination in combinations.items():
        print(f"width {width:g}: expected error {combination.error:.2%} of its profile")
    if not arguments.sigma:
        return 0
    files.make_parent(out or last.path, option="--out")
    config = (run / "config.toml").read_text(encoding="utf-8")
    sums = build(stored, {width: each.coefficients for width, each in combinations.items()})
    for width, tensors in sums.items():
        kind, images = averages.power(width), str(last.images_seen)
        file = out or last.path.with_name(f"{kind}-{last.path.name}.safetensors")
        weights.save(file, tensors, metadata={"kind": kind, "images": images, "config": config})
        print(f"wrote {file}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(prog="python -m trainer.ema", description=__doc__)
    add = p.add_argument
    add("run", type=Path, metavar="RUN", help="a run with snapshots of its averages")
    sigma = "relative widths to make, each a file of weights (default: list what can be made)"
    add("--sigma", type=float, nargs="+", metavar="WIDTH", help=sigma)
    at = "the time of the average, that of a snapshot in images (default: the last)"
    add("--at", type=int, metavar="IMAGES", help=at)
    out = "the .safetensors to write (default: RUN/averages/power-WIDTH-IMAGES.safetensors)"
    add("--out", type=Path, help=out)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    return reported(lambda: make(arguments))


if __name__ == "__main__":
    sys.exit(main())
