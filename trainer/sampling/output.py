"""What is drawn, on disk: an `.npz` file or a directory of shards, written part by part.

While it is drawn, its parts are in a directory beside it (`work`), each in full or not at all, with
the request that they are of, so that parts of two requests never mix. The output gets its name when
all of it is on disk.
"""

import json
import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import files
from trainer.common import near
from trainer.config.settings import differing
from trainer.run import lease as leases
from trainer.sampling.samplefile import open_samples, picture_record

# The file in `work` that holds the request.
REQUEST = "request.json"
# What requests of version 0.1 do not state.
_EARLIER = {"noise": 1, "labels": "balanced", "pixels": "round", "cfg": None, "guide_at": "x_t"}


class Output(ABC):
    """Where the images of one request go."""

    #: A directory DIR/ and a file DIR.npz have the same `work`: `has_foreign` tells their parts.
    is_directory: bool

    def __init__(self, path: Path, *, work: Path, size: int, request: Mapping[str, Any]) -> None:
        #: The finished file or directory, and the directory of its parts.
        self.path, self.work = path, work
        #: What is drawn, and the height and width of its images.
        self.request, self.size = request, size
        #: Entries of the request that are not known yet; any recorded value is taken as equal.
        self.unknown: tuple[str, ...] = ()
        #: The PNG of the first images.
        self.picture = work.with_suffix(".png")

    @abstractmethod
    def write(self, part: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Put a part on disk: images uint8 (B, H, W, 3) and labels (B,)."""

    @abstractmethod
    def listed(self) -> list[int]:
        """The parts that are on disk, not checked for damage."""

    @abstractmethod
    def fault(self, part: int, labels: NDArray[np.int64]) -> str | None:
        """What is wrong with a listed part that must have these labels (B,); reads every byte."""

    @abstractmethod
    def has_foreign(self) -> bool:
        """Whether `work` holds parts of an output of the other kind (`is_directory`)."""

    @abstractmethod
    def needed(self) -> int:
        """Bytes that are still to be written, at most; an estimate where images are compressed."""

    @abstractmethod
    def assemble(self, labels: NDArray[np.int64] | None) -> Path:
        """Join all parts, within `work`; `labels` (N,) are those of all images.

        Raises:
            ValueError: a part was damaged since it was drawn.
        """

    @property
    def images(self) -> int:
        """How many images there are in all."""
        return int(self.request["images"])

    @property
    def batch(self) -> int:
        """How many images there are in a part; the last one may have fewer."""
        return int(self.request["batch"])

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.batch)

    def is_drawn(self) -> bool:
        """Whether the output is there, whole and of this request.

        Raises:
            ValueError: something else is there.
        """
        if not self._is_taken():
            return False
        try:
            found = open_samples(self.path).record
        except ValueError:
            found = None
        wanted = self._wanted(found or {})
        if found != wanted:
            other = f" with other images ({_differing(found, wanted)})" if found else ""
            raise ValueError(f"{self.path} exists{other}: name another --out, or remove it")
        if self._is_left(wanted):
            self._remove_work()  # the last thing that a job does
        return True

    def _wanted(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The request as JSON returns it; entries that are `unknown` are as in `found`."""
        plain: dict[str, Any] = json.loads(json.dumps(self.request))
        return plain | {name: found.get(name) for name in self.unknown}

    def _is_left(self, request: Mapping[str, Any]) -> bool:
        """Whether `work` may be removed: no process uses it, and its parts are of this request."""
        if not self.work.exists() or self.has_foreign() or leases.live_holder(self.work):
            return False
        recorded = _recorded(self.work / REQUEST)
        if recorded is None:
            return all(
                name == REQUEST or name.endswith(".partial") for name in os.listdir(self.work)
            )
        return recorded == request

    def _remove_work(self) -> None:
        """Remove `work`, the request last: without it nothing says whose the parts are."""
        for name in set(os.listdir(self.work)) - {REQUEST}:
            path = self.work / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.work)

    def is_begun(self) -> bool:
        """Whether `work` is there, with this request.

        Raises:
            ValueError: it holds parts of another request, or does not say of which, or others.
        """
        files.check_link(self.work)
        recorded = _recorded(self.work / REQUEST)
        if recorded is None:
            self._check_left()
            return False
        wanted = self._wanted(recorded)
        if recorded != wanted:
            raise ValueError(
                f"{self.work} holds parts of another request ({_differing(recorded, wanted)}): "
                "give the same options, remove it, or name another --out"
            )
        if self.has_foreign():
            raise ValueError(
                f"{self.work} holds parts of a {'file' if self.is_directory else 'directory'} of "
                f"this name: draw that --out to its end, remove {self.work}, or name another --out"
            )
        if beyond := [part for part in self.listed() if part >= self.parts]:
            raise ValueError(
                f"{self.work} holds a part {beyond[0]}, and this request has {self.parts}, from 0: "
                "remove it, or name another --out"
            )
        return True

    def check_picture(self) -> None:
        """Raise ValueError where the grid would replace a picture of something else."""
        if not self.picture.exists():
            return
        found = picture_record(self.picture)
        if found is None or found != self._wanted(found):
            raise ValueError(
                f"{self.picture} exists, where the grid of {self.path} would go: name another "
                "--out, or remove it"
            )

    def open(self) -> None:
        """Make `work`, unless it is there; ValueError as `is_begun`."""
        if self.is_begun():
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.request)
            files.write(self.work / REQUEST, text, writer=self.writer)  # as other shares may now
            files.sync(self.work.parent)
        except OSError as error:
            raise ValueError(
                f"cannot write {self.work}: {files.reason(error)}; name another --out"
            ) from None

    @property
    def writer(self) -> str:
        """The suffix of this process's partial files: one that was given up may still write."""
        return f"{socket.gethostname()}.{os.getpid()}.partial"

    @contextmanager
    def claimed(self, share: tuple[int, int] = (0, 1)) -> Iterator[leases.Lease]:
        """The right to draw a share of these parts, or all, while entered.

        Raises:
            ValueError: another process is drawing them.
        """
        own = self.work if share == (0, 1) else self.work / f"share-{share[0]}-of-{share[1]}"
        # To draw all parts, no share may be being drawn; to join them when all are there, it may.
        draws_all = own == self.work and len(self.listed()) < self.parts
        shares = self.work.glob("share-*") if draws_all else ()
        for place in {self.work, own, *shares}:
            if (busy := leases.live_holder(place)) is not None:
                raise ValueError(f"{busy} is drawing {place}: wait for it, or name another --out")
        lease = leases.claim(own)
        try:
            yield lease
        finally:
            lease.release()

    def check_free(self) -> None:
        """Raise ValueError where something else has the output's name, or that of its grid."""
        if self._is_taken():
            raise ValueError(f"{self.path} exists: name another --out, or remove it")
        self.check_picture()

    def publish(self, whole: Path) -> None:
        """Give the joined parts the output's name, and remove `work`.

        Raises:
            ValueError: as `check_free`.
        """
        self.check_free()
        whole.rename(self.path)
        files.sync(self.path.parent)
        self._remove_work()

    def _is_taken(self) -> bool:
        """Whether something has the output's name, other than an empty directory.

        A link to one counts: a directory cannot be renamed to a link's name.
        """
        if self.path.is_symlink():
            return True
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def _check_left(self) -> None:
        """Raise ValueError if `work` has no request, but parts or files of something else."""
        parts = self.work
        left = sorted(os.listdir(parts)) if parts.exists() else []
        known = (REQUEST, "launch")
        if any(name[:6].isdigit() and not name.endswith(".partial") for name in left):
            raise ValueError(
                f"{parts / REQUEST} is missing or damaged, so it is not known of which request "
                f"the parts beside it are: remove {parts} to draw them again, or name another --out"
            )
        if foreign := [n for n in left if n not in known and not n.endswith(".partial")]:
            raise ValueError(f"{parts} holds other files ({foreign[0]}): name another --out")


def numbered(directory: Path, suffix: str) -> list[int]:
    """The numbers N for which a directory has a file N + `suffix`, ascending.

    Listing also refreshes what a network file system shows.
    """
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _recorded(record: Path) -> dict[str, Any] | None:
    """The request in a REQUEST file; None where it is missing or damaged."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    earlier = _EARLIER if found.get("classes") else {**_EARLIER, "labels": None}
    return {**earlier, **found}


def begun(out: str) -> set[str]:
    """Checksums of the weights that half-drawn outputs of `--out` are drawn with.

    Also those of its finished bases, whose images are still to be enlarged.
    """
    path = Path(out.rstrip("/").removesuffix(".npz"))
    name = re.compile(rf"{re.escape(path.name)}(-(scale|cfg)[-+.\de]+)*(-base)?\.parts")
    works = [work for work in path.parent.glob("*.parts") if name.fullmatch(work.name)]
    requests = [_recorded(work / REQUEST) or {} for work in works]
    bases = [f"{work.stem}-base{end}" for work in works for end in ("", ".npz")]
    for base in bases:
        with suppress(ValueError):  # there is none
            requests.append(dict(open_samples(path.with_name(base)).record or {}))
    return {checksum for request in requests for checksum in request.get("sources", ())}


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    pairs = [(n, *near(repr(a), repr(b))) for n, (a, b) in differing(found, wanted).items()]
    return "; ".join(f"{name} was {was}, is {now}" for name, was, now in pairs)
