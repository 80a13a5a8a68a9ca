"""The manifest of a packed dataset: `manifest.json`, its text and its checks.

It names the shards with their sizes and checksums, the classes, and a fingerprint over all of it,
which identifies the dataset.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data import files
from data.config import check, naming
from data.tars import HEADER

MANIFEST = "manifest.json"
FORMAT = "adm-shards-1"

# The name of the class of images without a label.
NO_CLASS = ""

# Names are safe as files of a cache, in URLs and in shell commands.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 50


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file as the manifest lists it.

    Raises:
        ValueError: a value of another type, or one that no shard can have.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    def __post_init__(self) -> None:
        check_name(self.name)
        for name in ("sha256", "index_sha256"):
            value = getattr(self, name)
            is_digest = isinstance(value, str) and bool(_SHA256.fullmatch(value))
            check(is_digest, name, value, "64 hex digits")
        is_size = type(self.bytes) is int and 0 <= self.bytes <= _MAX_BYTES
        check(is_size, "bytes", self.bytes, f"from 0 to {_MAX_BYTES}")
        most = self.bytes // HEADER
        is_count = type(self.samples) is int and 0 <= self.samples <= most
        expected = f"from 0 to {most}, the most that a tar of {self.bytes} bytes can hold"
        check(is_count, "samples", self.samples, expected)

    @property
    def tar(self) -> str:
        """The file name of the tar."""
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        """The file name of the index."""
        return f"{self.name}.idx.npy"

    def is_intact(self, directory: Path) -> bool:
        """Whether both files in a directory have these checksums; OSError where one is missing."""
        found = files.sha256(directory / self.tar), files.sha256(directory / self.index)
        return found == (self.sha256, self.index_sha256)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed dataset contains."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    #: None where images keep their own sizes.
    image_size: int | None
    fingerprint: str
    #: The smaller side to which larger ones of these were scaled down, if that is known.
    kept_side: int | None = None
    #: How the tars were made.
    made_by: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)


def check_name(name: object) -> None:
    """Raise ValueError unless a shard may have this name."""
    expected = "letters, digits, '_', '-' and '.', and begin with a letter, a digit or '_'"
    check(isinstance(name, str) and bool(_NAME.fullmatch(name)), "name", name, expected)


def manifest_text(
    shards: tuple[Shard, ...],
    *,
    classes: tuple[str, ...],
    image_size: int | None,
    made_by: Mapping[str, Any],
) -> str:
    """The manifest as JSON, with its fingerprint; the arguments are those of `Manifest`."""
    body = {
        "format": FORMAT,
        "image_size": image_size,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
        "made_by": made_by,
    }
    return json.dumps({**body, "fingerprint": _fingerprint(body)}, indent=1) + "\n"


def is_manifest(path: Path) -> bool:
    """Whether a file exists and is the manifest of a packed dataset, not of another program."""
    return path.is_file() and FORMAT.encode() in path.read_bytes()


def parse_manifest(where: str, content: bytes) -> Manifest:
    """The manifest in the content of a file; `where` names it in messages.

    Raises:
        ValueError: it is damaged, altered, or something else; the message names the entry.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not the manifest of a packed dataset ({FORMAT})")
    fingerprint = manifest.pop("fingerprint", None)
    if fingerprint != _fingerprint(manifest):
        raise ValueError(f"{where} was altered: its fingerprint does not match its content")
    made_by = manifest.get("made_by")
    made_by = made_by if isinstance(made_by, dict) else {}
    classes: Any = manifest.get("classes")
    size = manifest.get("image_size")
    with naming(where):
        shards = _parse_shards(manifest.get("shards"))
        are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        check(are_names and bool(classes), "classes", classes, "a list of one or more names")
        is_size = size is None or (type(size) is int and size >= 1)
        check(is_size, "image_size", size, "at least 1, or null")
        return Manifest(
            shards=shards,
            classes=tuple(classes),
            image_size=size,
            fingerprint=fingerprint,
            kept_side=_parse_kept_side(made_by),
            made_by=made_by,
        )


def _parse_shards(entries: Any) -> tuple[Shard, ...]:
    check(isinstance(entries, list), "shards", entries, "a list")
    shards: dict[str, Shard] = {}
    for i, entry in enumerate(entries):
        with naming(f"shards[{i}]"):
            shard = _parse_shard(entry)
        if shard.name in shards:
            raise ValueError(f"shards[{i}]: name = {shard.name!r}: an earlier shard has this name")
        shards[shard.name] = shard
    return tuple(shards.values())


def _parse_shard(entry: object) -> Shard:
    wanted = {each.name for each in fields(Shard)}
    if not (isinstance(entry, dict) and entry.keys() == wanted):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{found!r:.80}: must have the keys {', '.join(sorted(wanted))}")
    try:
        check_name(entry["name"])
    except ValueError as error:
        raise ValueError(
            f"{error}; if the dataset is yours, rename the .tar files, delete {MANIFEST} and run "
            "`python -m data.shards index`"
        ) from None
    return Shard(**entry)


def _parse_kept_side(made_by: Mapping[str, Any]) -> int | None:
    """The `--size` of a packing with `--keep-original`."""
    if made_by.get("keep_original") is not True:
        return None
    size = made_by.get("size")
    return size if type(size) is int else None


def _fingerprint(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
