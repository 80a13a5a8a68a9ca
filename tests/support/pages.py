"""The documentation's pages: their commands, prose, links and anchors."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
#: What a line of a code block without a language begins with.
PROGRAMS = (
    "apptainer", "cp", "docker", "kubectl", "make", "mpirun", "pip", "python", "sbatch", "srun",
    "tensorboard", "torchrun",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of a page, a line each; continued lines are joined and remarks left out."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def module(self) -> str | None:
        """The module that Python runs; None of another program."""
        found = re.search(r"\bpython[\d.]* -m (\S+)|\btorchrun .*-m -- (\S+)", self.text)
        return (found[1] or found[2]) if found else None

    @property
    def arguments(self) -> list[str]:
        """The words after the module."""
        assert self.module is not None
        return self.words[self.words.index(self.module) + 1 :]


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def _lines(self) -> list[tuple[int, str | None, str]]:
        """Each line with its number and the language of its block: None outside of any."""
        found, language = [], None
        for number, line in enumerate(self.text.splitlines(), 1):
            fence = re.match(r" *```(\w*)", line)
            if fence:
                language = fence[1] if language is None else None
            else:
                found.append((number, language, line))
        return found

    @property
    def prose(self) -> str:
        return "\n".join(line for _, language, line in self._lines if language is None)

    @property
    def commands(self) -> list[Command]:
        """All lines of the blocks that name no language."""
        found: list[Command] = []
        start, text = 0, ""
        for number, language, line in self._lines:
            if language != "" or not line.strip():
                continue
            text, start = f"{text} {line.strip()}".strip(), start or number
            if text.endswith("\\"):
                text = text.removesuffix("\\").strip()
                continue
            text = re.sub(r"\s+# .*$|^# .*$", "", text)
            if text:
                found.append(Command(self.name, start, text))
            start, text = 0, ""
        return found

    @property
    def python(self) -> str:
        """All lines of the blocks of Python."""
        return "\n".join(line for _, language, line in self._lines if language == "python")

    @property
    def snippets(self) -> list[str]:
        """What stands between backquotes in the prose."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        titles = re.findall(r"^#+ (.*)$", self.prose, flags=re.M)
        plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        return set(plain)


PAGES = [
    Page(path)
    for path in (
        ROOT / "README.md",
        ROOT / "data" / "README.md",
        ROOT / "launch" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
