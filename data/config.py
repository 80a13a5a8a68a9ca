"""Settings of the data layer: frozen dataclasses, checked when they are made.

Neither torch nor numpy is imported here: a login node checks presets with Python alone.
"""

import math
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

# USER:PASSWORD@ of a URL, also with a slash in the password, where no port ends before it.
_USER = re.compile(r"(://)(?:[^/\s]+|[^/@\s:]*:(?!\d+/)[^@\s'\"]*)@")
_SECRET = re.compile(
    r"((?:authorization:\s*(?:\w+\s+)?|(?<!\S)(?:-u|--user)[\s=]+['\"]?[^\s:'\"]*:"
    r"|[\w-]*(?:token|secret|passw\w*|credential|signature|\bsig\b|(?:api|access)[_-]?key)[\w-]*"
    r"\s*[=:]\s*))[^&\s'\"]+",
    re.IGNORECASE,
)
# The query of a URL, up to the end of a sentence, and a part of it without a name, or of one that
# is no word for a secret elsewhere.
_QUERY = re.compile(r"(://[^\s?'\"]*\?)([^\s'\"]*[^\s'\".,:;)])")
_PART = re.compile(r"(^|&)((?:key|auth)=|)(?:[^&=]+=*)(?=&|$)", re.IGNORECASE)

# Characters that are not percent-encoded in the path of a URL, besides letters and digits.
_OF_URLS = "/%:@!$&'()*+,;=~"


def check(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError, naming the setting, its value and what it must be, unless `holds`."""
    if not holds:
        # Cut: a damaged file may have anything for a value.
        raise ValueError(f"{name} = {value!r:.80}: must be {expected}")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Prefix the message of a ValueError with a name, such as that of a setting or a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def is_local(root: str) -> bool:
    """Whether `root` is a directory of this machine, not a URL or a command."""
    return "://" not in root and not root.startswith("pipe:")


def expanded(path: str, *, name: str) -> str:
    """A path with `~` and `$VARIABLES` replaced; URLs and commands stay as they are.

    Raises:
        ValueError: a variable or a home directory is unknown on this machine.
    """
    if not is_local(path):
        return path
    found = os.path.expandvars(os.path.expanduser(path))
    # A directory may have a $ in its name.
    if ("$" in found or found.startswith("~")) and not os.path.exists(found):
        raise ValueError(f"{name} = {path}: {found} has variables that are not set on this machine")
    return found


def shown(root: str) -> str:
    """A root as messages and files show it: without passwords, keys and signatures."""
    found = _SECRET.sub(r"\1***", _USER.sub(r"\1***@", root))
    return _QUERY.sub(lambda query: query[1] + _PART.sub(r"\1\2***", query[2]), found)


def login_and_url(root: str) -> tuple[str, urllib.parse.SplitResult]:
    """USER:PASSWORD of a URL, and the URL without it, in ASCII; ValueError if it is no URL."""
    try:
        parts = urllib.parse.urlsplit(root)
        is_url = bool(parts.hostname) and parts.port != 0  # raises where it is no number
        user, _, host = parts.netloc.rpartition("@")
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError:  # its message may contain a part of the password
        is_url = False
    if not is_url:
        raise ValueError(
            f"data.shards = {shown(root)}: must be http(s)://HOST/..., with %2F, %3F and %23 in "
            "place of /, ? and # in a password"
        )
    path = urllib.parse.quote(parts.path.rstrip("/"), safe=_OF_URLS)
    query = urllib.parse.quote(parts.query, safe=f"{_OF_URLS}?")
    return user, parts._replace(netloc=host, path=path, query=query, fragment="")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How to read a dataset's files: attempts, time limit, and a cache of this node."""

    #: Attempts after one that failed.
    retries: int = 6
    #: Seconds without an answer that are a failure.
    timeout_s: float = 30.0
    #: A directory of the node, which its ranks share, for what comes over a network. Absent: none.
    cache: str | None = None
    #: The most GiB that it holds of each dataset.
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        check(self.retries >= 0, "data.retries", self.retries, "at least 0")
        seconds = self.timeout_s  # `poll` takes no more than 2^31 ms
        check(0 < seconds <= 1e6, "data.timeout_s", seconds, "above 0, and at most 1,000,000")
        check(0 < self.cache_gb < math.inf, "data.cache_gb", self.cache_gb, "above 0, and finite")


@dataclass(frozen=True, kw_only=True)
class DataConfig(FetchConfig):
    """Which shards to read, in which order, and how to make images of them."""

    #: Directory or URL of the packed images.
    shards: str
    #: Follows from model.image_size.
    image_size: int = field(metadata={"follows": "model.image_size"})
    #: Logical streams; they make the order, so a run keeps them.
    streams: int = 192
    #: Images of a stream that are mixed at once; a run keeps it.
    block: int = 512
    #: Processes of each rank that decode. 0: the trainer decodes.
    workers: int = 2
    #: Mirror half of the images, drawn anew for each image seen.
    flip: bool = True
    #: "random": of 80 to 100 % of the smaller side, for classifiers.
    crop: Literal["center", "random"] = "center"
    #: Other shards that a run is validated on. Absent: none.
    validation: str | None = None
    #: How many of them. Absent: all.
    validation_images: int | None = None
    #: MiB of images that are decoded ahead.
    prefetch_mb: int = 256
    #: Share of damaged images beyond which the run stops.
    max_bad: float = 0.001
    #: Further datasets in the same stream.
    mix: tuple[str, ...] = ()
    #: The share of the images that each has; the rest is from `shards`.
    mix_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "streams", "block", "prefetch_mb"):
            value = getattr(self, name)
            check(value >= 1, f"data.{name}", value, "at least 1")
        images = self.validation_images
        check(images is None or images >= 1, "data.validation_images", images, "at least 1")
        check(self.workers >= 0, "data.workers", self.workers, "at least 0 (decode in the trainer)")
        check(self.crop in ("center", "random"), "data.crop", self.crop, '"center" or "random"')
        check(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "a share between 0 and 1")
        shares = list(self.mix_shares)
        each = f"one share for each of the {len(self.mix)} datasets of data.mix"
        check(len(shares) == len(self.mix), "data.mix_shares", shares, each)
        # Rounded, since 0.7 + 0.2 + 0.1 is less than 1 in floating point.
        are_shares = all(share > 0 for share in shares) and round(sum(shares), 9) < 1
        together = "above 0, and below 1 together: the rest is the share of data.shards"
        check(are_shares, "data.mix_shares", shares, together)
