"""Which code runs: the release, and the commit of a git checkout or of the copy that a job runs."""

import hashlib
import subprocess
from contextlib import suppress
from pathlib import Path

VERSION = "0.2.0"

_ROOT = Path(__file__).resolve().parent.parent
# The file with the commit in a copy of the code that is no git checkout.
COMMIT = "COMMIT"


def commit(root: Path = _ROOT) -> str:
    """The commit of the code under `root`, with "-dirty" if files differ from it; or ""."""
    if (root / ".git").exists():
        # Git refuses another user's checkout, as in a container; but its code runs already. Named,
        # it is this one also where GIT_DIR is another, as in a hook.
        git = ["git", "-c", "safe.directory=*", "-C", str(root), "--git-dir=.git", "--work-tree=."]
        command = [*git, "describe", "--always", "--dirty", "--exclude=*"]
        with suppress(OSError):  # no git here
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            return found.stdout.strip()
    with suppress(OSError):
        return (root / COMMIT).read_text().strip()
    return ""


def digest(root: Path = _ROOT) -> str:
    """The checksum of the code that trains: the Python files of `data` and `trainer`."""
    found = hashlib.sha256()
    files = [*(root / "data").rglob("*.py"), *(root / "trainer").rglob("*.py")]
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def version() -> str:
    """Such as "0.2.0 (3eb1603)"."""
    found = commit()
    return f"{VERSION} ({found})" if found else VERSION
