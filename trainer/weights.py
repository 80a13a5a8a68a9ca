"""Weights in files: writing them, loading those of any origin, and filling a network with them."""

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import files

#: The optimizer's state as checkpoints have it, a file of each, and its keys in the optimizer.
MOMENTS = {"adam-m": "exp_avg", "adam-v": "exp_avg_sq"}
# The entry of a safetensors header that holds the metadata.
_METADATA = "__metadata__"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: whole and on disk when this returns, or not at all.

    safetensors writes beside its target, under a random name that a kill would leave, and lets its
    owner alone read the file (safetensors#782). So it gets a directory, and the mode is restored.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    aside = path.with_name(f"{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        file = aside / path.name
        file.touch()
        mode = file.stat().st_mode
        save_file(dict(tensors), file, metadata=dict(metadata))
        if len(metadata) > 1:
            _sort_metadata(file)
        with suppress(OSError):  # some file systems have no modes
            file.chmod(mode)
        files.sync(file)
        file.replace(path)
        files.sync(path.parent)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata, in place: safetensors writes it in a random order."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header[_METADATA] = dict(sorted(header.get(_METADATA, {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:  # else this safetensors formats its header in another way
            stream.seek(8)
            stream.write(text)


def load(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a published `.pt` file (never unpickling code).

    A file is mapped where its format allows it: it is read when its tensors are used. Prefixes that
    wrappers put before all names are removed, and a dict `{"state_dict": ...}` around the weights.

    Raises:
        ValueError: the file is missing, empty, or holds something else, such as a state of Adam.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such weights file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is no weights file: it is empty")
    is_safe = path.suffix == ".safetensors"
    if is_safe:
        _check_kind(path, metadata(path))
    try:
        found = load_file(path) if is_safe else _unpickle(path)
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no weights file: {why}") from None
    except Exception as error:  # torch raises pickle's own errors for unsafe or foreign files
        raise ValueError(f"{path} is no plain weights file: {_why(error, path)}") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds {_kinds(found, path)}, not a dict of tensors")
    return _named(found)


def _kinds(found: Any, path: Path) -> str:
    """What a file holds instead of weights, and how to extract the weights among it, if any."""
    if not isinstance(found, dict):
        return type(found).__name__
    inside = [
        name
        for name, value in found.items()
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values())
    ]
    best = next((name for name in inside if "ema" in str(name)), inside[0] if inside else None)
    hint = f" (write the weights alone: torch.save(torch.load({str(path)!r})[{best!r}], 'w.pt'))"
    return f"{[*map(str, found)][:5]}{hint if inside else ''}"


def _why(error: Exception, path: Path) -> str:
    """Why a file cannot be unpickled safely, and the way out if it holds objects."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return type(error).__name__
    return (
        f"it holds a {found[1]}, which may run code when it is loaded; where you trust the file, "
        f"write the weights alone: found = torch.load({str(path)!r}, weights_only=False); "
        "torch.save(found['state_dict'], 'w.pt')"
    )


def _unpickle(path: Path) -> Any:
    """What a `.pt` file holds; those of torch before 1.6 cannot be mapped."""
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without prefixes that all names have, such as module, _orig_mod, model.

    They are those of wrappers: every network here has several parts.
    """
    while len({name.partition(".")[0] for name in weights}) == 1 and len(weights) > 1:
        shorter = {name.partition(".")[2]: value for name, value in weights.items()}
        if "" in shorter:
            break
        weights = shorter
    return dict(weights)


def _check_kind(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise ValueError where a checkpoint's file holds other tensors than weights."""
    # Files of version 0.1 say in their metadata only that they are a checkpoint's.
    kind = metadata.get("kind", path.stem if "images" in metadata else "model")
    if kind.startswith(tuple(MOMENTS)):
        raise ValueError(
            f"{path} holds {kind}, a state of the optimizer: give an ema-* file, or model"
        )


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file; ValueError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no weights file: {str(error).splitlines()[0]}") from None


def fill(net: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load `weights` into `net`, strictly: as `check_fit` and `check_finite`."""
    check_fit(net.state_dict(), weights, source=source)
    check_finite(weights, source=source)
    net.load_state_dict(dict(weights))
    hint = f" in {next(net.parameters()).dtype}: give another --precision"
    check_finite(net.state_dict(), source=source, hint=hint)


def check_finite(weights: Mapping[str, Tensor], *, source: str | Path, hint: str = "") -> None:
    """Return if all values are finite.

    Raises:
        ValueError: some are not, or a tensor has another dtype than weights may have, such as
            float8; names the first such tensor, and gives the hint.
    """
    for name, value in weights.items():
        if value.dtype not in _DTYPES:
            known = ", ".join(f"{dtype}".removeprefix("torch.") for dtype in _DTYPES)
            raise ValueError(f"{source}: {name} is in {value.dtype}: weights must be in {known}")
        if not value.isfinite().all():
            raise ValueError(f"{source}: {name} has values that are not finite{hint}")


def compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Return if a file reads back as these fp32 tensors, bit for bit.

    Raises:
        OSError: it does not; some network file systems lose writes without an error.
    """
    with safe_open(file, framework="pt") as found:
        for name, value in tensors.items():
            if not torch.equal(found.get_tensor(name).view(torch.int32), value.view(torch.int32)):
                raise OSError(errno.EIO, f"{name} reads back differently", str(file))


def materialize(
    net: nn.Module, start: Mapping[str, Tensor] | None, *, device: torch.device
) -> None:
    """Move a network from the meta device to `device`, with the weights of `start`.

    With None they are uninitialised, for a rank that will receive them from another.
    """
    net.to_empty(device=device)
    if start is not None:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(start[name])


def check_fit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    source: str | Path,
    hint: Callable[[Sequence[str]], str] = lambda _: "",
) -> None:
    """Return if `weights` have the names and shapes of a network's `own`.

    Raises:
        ValueError: they do not; it ends with `hint` of the names that differ.
    """
    wrong = {name: "is missing" for name in own if name not in weights}
    wrong |= {name: "is unknown" for name in weights if name not in own}
    wrong |= {
        name: f"is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    }
    if wrong:
        said = "; ".join(f"{name} {what}" for name, what in list(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source} does not fit the network of this preset: {said}{more}{hint(list(wrong))}"
        )
