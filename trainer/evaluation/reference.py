"""The images that samples are compared with: statistics in a file, or images to make them of.

A reference file is an `.npz` in the ADM evaluator's layout: `mu`, `sigma` of the pooled features,
`mu_s`, `sigma_s` of the spatial ones over all images, and up to 10,000 images in `arr_0` for
precision and recall. Files made here also have the features of these images, and a record of the
network, the dataset and the order of the spatial features: height, width, channel, as in the
evaluator's. Files made here whose record has no order have channel, height, width.
"""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import files, npz
from data.config import naming
from data.progress import Progress
from trainer.config.sections import FEWEST_SAMPLES
from trainer.evaluation.extraction import Extracted
from trainer.evaluation.features import FeatureNetwork
from trainer.evaluation.figures import Statistics
from trainer.evaluation.inception import SPATIAL
from trainer.sampling.samplefile import Samples, open_samples

# Precision, recall and the kernel distance use so many images of a reference, as the evaluator.
MANIFOLD = 10_000
_ABOUT = "reference"
_ORDER = "height, width, channel"
_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference in the features of one network."""

    name: str
    #: The sha256 of the file, or the dataset's fingerprint.
    checksum: str
    #: The number of images in the statistics; None where a file does not say.
    count: int | None
    pool: Statistics
    spatial: Statistics | None
    #: Features (M, D) of all images, or of `MANIFOLD` of them; None where a file has neither.
    features: Tensor | None


def chosen(count: int) -> NDArray[np.int64]:
    """The positions of the images, of `count`, that precision and recall use; ascending."""
    if count <= MANIFOLD:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:MANIFOLD])


def check_images(reference: Samples, *, size: tuple[int, int]) -> None:
    """Raise ValueError unless a reference's images can be compared with samples of that size."""
    if reference.count < FEWEST_SAMPLES:
        there = f"{reference.path} has {reference.count} images"
        raise ValueError(f"{there}: must be at least {FEWEST_SAMPLES}")
    if reference.size != size:
        here, there = (f"{height} x {width}" for height, width in (size, reference.size))
        raise ValueError(
            f"samples are {here}, the images of {reference.path} {there}: they cannot be compared"
        )


def of_images(samples: Samples, found: Extracted) -> Reference:
    """The reference that images are, of the features that `Evaluator.extract` found."""
    return Reference(
        name=str(samples.path),
        checksum=samples.checksum(),
        count=found.count,
        pool=found.pool[0],
        spatial=found.spatial[0] if found.spatial else None,
        features=found.features,
    )


def is_statistics(path: Path) -> bool:
    """Whether a path is a file with statistics; other files and directories hold images."""
    if path.is_dir():
        return False
    return "mu" in _open(path)


def load(
    path: Path, *, network: FeatureNetwork, size: tuple[int, int]
) -> tuple[Reference, Samples | None]:
    """Read a file of statistics; also its images, if their features are still to be computed.

    `size` is the height and width of the samples.

    Raises:
        ValueError: the file is damaged, or made with another network.
    """
    stored = _open(path)
    named = f"reference {path}"
    with naming(named):
        about = _about(stored)
    if about is None and not network.is_inception:
        raise ValueError(
            f"{path} does not say of which network its features are, so it is one of the ADM "
            f"evaluator's: give the Inception weights as the network instead of {network.name}"
        )
    if about and not network.is_recorded(str(about["network"]), about["network_sha256"]):
        raise ValueError(
            f"{path} holds features of {about['network']}, not of {network.name} "
            f"({network.sha256[:8]}): make it again with this network"
        )
    images = open_samples(path) if "arr_0" in stored else None
    if images is not None:
        check_images(images, size=size)
    with naming(named):
        pool, spatial = _statistics(stored, "pool"), _spatial(stored, about)
        assert pool is not None
        features = _features(stored, columns=len(pool.mean))
    reference = Reference(
        name=str(path),
        checksum=files.sha256(path),
        count=about["count"] if about else None,
        pool=pool,
        spatial=spatial,
        features=features,
    )
    return reference, images if features is None else None


def earlier(path: Path) -> dict[str, Any] | None:
    """The record in a reference file that was made here; None where there is no such file."""
    if not zipfile.is_zipfile(path):
        return None  # numpy would read all of it
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = json.loads(str(stored[_ABOUT]))
    except Exception:  # numpy and zipfile raise errors of many types for other files
        return None
    return found if isinstance(found, dict) else None


def save(
    path: Path,
    reference: Reference,
    *,
    samples: Samples,
    network: FeatureNetwork,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a reference file, with the images that precision and recall are computed from.

    `say` is called with a line about the progress.
    """
    assert reference.features is not None
    about = {
        "network": network.name,
        "network_sha256": network.sha256,
        "images": reference.name,
        "images_checksum": reference.checksum,
        "count": reference.count,
        "spatial_order": _ORDER,
    }
    arrays: dict[str, NDArray[Any]] = {
        "features": reference.features.cpu().numpy(),
        _ABOUT: np.array(json.dumps(about)),
    }
    for kind, value in (("pool", reference.pool), ("spatial", reference.spatial)):
        if value is not None:
            mean, covariance = _NAMES[kind]
            arrays |= {mean: value.mean.cpu().numpy(), covariance: value.covariance.cpu().numpy()}
    places = chosen(samples.count).tolist()
    progress = Progress(total=len(places), unit="images written", say=say)
    with files.whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            stream.write(npz.image_header((len(places), *samples.size, 3)))
            for place in progress.over(places):
                stream.write(samples.images(place, place + 1).tobytes())
        npz.add(archive, arrays)


def _open(path: Path) -> Any:
    """The arrays of a file, read when they are asked for."""
    if not path.is_file():
        raise ValueError(f"reference {path}: no such file or directory of shards")
    try:
        found = np.load(path, allow_pickle=False)
        assert isinstance(found, np.lib.npyio.NpzFile)
    except PermissionError:
        raise
    except Exception as error:  # numpy and zipfile raise errors of many types for other files
        raise ValueError(f"reference {path}: not a readable .npz: {error}") from None
    return found


def _tensor(stored: Any, name: str) -> Tensor | None:
    """A member of numbers; None where there is none of that name."""
    if name not in stored:
        return None
    try:
        return torch.from_numpy(stored[name])
    except Exception as error:  # numpy and zipfile raise errors of many types for damaged files
        raise ValueError(f"{name} is damaged: {error}") from None


def _about(stored: Any) -> dict[str, Any] | None:
    """The record in a file; None in the ADM evaluator's."""
    if _ABOUT not in stored:
        return None
    try:
        found = json.loads(str(stored[_ABOUT]))
        named = {name: found[name] for name in ("network", "network_sha256", "count")}
        return named | {"spatial_order": found.get("spatial_order")}
    except Exception as error:  # as in `_tensor`, and of what is no such JSON
        raise ValueError(
            f"its member {_ABOUT!r} is damaged, or of another program "
            f"({type(error).__name__}: {error})"
        ) from None


def _features(stored: Any, *, columns: int) -> Tensor | None:
    found = _tensor(stored, "features")
    if found is not None and (
        found.shape[1:] != (columns,) or not found.is_floating_point() or not found.isfinite().all()
    ):
        raise ValueError(
            f"features are {found.dtype} {tuple(found.shape)}: must be finite numbers "
            f"(M, {columns}), as many columns as mu has"
        )
    return found


def _spatial(stored: Any, about: dict[str, Any] | None) -> Statistics | None:
    """The spatial statistics in the order height, width, channel."""
    found = _statistics(stored, "spatial")
    if found is None:
        return None
    order = _ORDER if about is None else about["spatial_order"]
    if order not in (None, _ORDER):
        raise ValueError(f"mu_s is by {order!r}: must be by {_ORDER!r}; make it again")
    if len(found.mean) != math.prod(SPATIAL):
        raise ValueError(
            f"mu_s has {len(found.mean)} numbers: must be {math.prod(SPATIAL)}, as Inception's "
            "spatial features"
        )
    if order == _ORDER:
        return found
    places = torch.arange(len(found.mean)).view(SPATIAL).movedim(0, -1).flatten()
    return Statistics(found.mean[places], found.covariance[places][:, places])


def _statistics(stored: Any, kind: str) -> Statistics | None:
    names = _NAMES[kind]
    mean, covariance = (_tensor(stored, name) for name in names)
    if mean is None:
        return None
    if covariance is None:
        raise ValueError(f"{names[0]} is there without {names[1]}")
    mean, covariance = mean.double(), covariance.double()
    is_finite = bool(mean.isfinite().all() and covariance.isfinite().all())
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or not is_finite:
        raise ValueError(
            f"{names} are {tuple(mean.shape)} and {tuple(covariance.shape)}: must be a mean (D,) "
            "and a covariance (D, D) of finite numbers"
        )
    return Statistics(mean, covariance)
