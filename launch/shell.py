"""Text for a shell: quoted words, long commands with one option to a line, filled templates."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

_TEMPLATES = Path(__file__).parent / "templates"


def quoted(words: Iterable[object]) -> str:
    """Words as the shell reads them back."""
    return shlex.join(str(word) for word in words)


def command(*words: object) -> str:
    """A command as the shell reads it, one long option to a line."""
    text = ""
    for word in map(str, words):
        is_option = (word.startswith("--") and word != "--") or word in ("-x", "-genv")
        text += (" \\\n  " if is_option else " " if text else "") + quoted([word])
    return text


def fill(template: str, **values: object) -> str:
    """A file of `templates/` with its @name@ marks filled in, without the newline at its end."""
    text = (_TEMPLATES / template).read_text().rstrip()
    return re.sub(r"@([a-z]+)@", lambda mark: str(values[mark[1]]), text)


def sbatch_path(directory: Path, name: str) -> str:
    """A file for an #SBATCH line, which has its own quoting; `name` may have %j and such in it."""
    place = f"{directory}".replace('"', '\\"').replace("%", "%%")
    path = f"{place}/{name}"
    return path if re.fullmatch(r"[\w./%-]+", path) else f'"{path}"'
