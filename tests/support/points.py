"""The moments of a save at which a process of the chaos kills itself; damage to checkpoints."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import ranks

DAMAGE = ("a flipped byte", "a truncated file", "a missing state")
POINTS = ("in a file", "between files", "before the rename", "after the rename", "in the pruning")


def arm(point: str) -> None:
    """Let this process be killed where a save has come to."""
    from trainer import saver, weights

    def die_at(module: Any, name: str, matches: Callable[[Path], bool], cut: Any = None) -> None:
        act = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            path = next(a for a in arguments if isinstance(a, Path))
            if not matches(path):
                return act(*arguments, **named)
            (cut or act)(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, wrapped)

    def half(tensors: Any, file: Path, **named: Any) -> None:
        write(tensors, file, **named)
        os.truncate(file, file.stat().st_size // 2)

    def one_file(directory: Path) -> None:
        next(directory.iterdir()).unlink()

    write = weights.save_file
    if point == "in a file":
        die_at(weights, "save_file", lambda path: True, half)
    elif point == "between files":
        die_at(weights, "save", lambda path: True)
    elif point == "before the rename":
        die_at(saver.files, "write", lambda path: path.parent.suffix == ".partial")
    elif point == "after the rename":
        die_at(saver.files, "sync", lambda path: path.name == "checkpoints")
    else:
        die_at(saver.shutil, "rmtree", lambda path: path.suffix == ".removed", one_file)


def damage(checkpoint: Path, kind: str, *, chance: random.Random) -> None:
    """Damage a file of a checkpoint."""
    file = chance.choice(sorted(checkpoint.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "a flipped byte":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "a truncated file":
        os.truncate(file, chance.randrange(len(content)))
    else:
        (checkpoint / "state.json").unlink()


def torchrun(words: list[str], *, log: Path) -> subprocess.Popen:
    """Start a training of two ranks under torchrun."""
    port = str(ranks.free_port())
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = [sys.executable, *launcher, "-m", "--", "trainer.train", *words]
    with log.open("w") as output:
        return subprocess.Popen(
            command, cwd=ranks.ROOT, env=ranks.environment(), stdout=output, stderr=output
        )
