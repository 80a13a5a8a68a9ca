"""All that a checkpoint holds beside tensors.

What a run needs beyond this is a function of its config and of the clock `images_seen`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainer.adm.config import check


class Gathered(Protocol):
    """Sharded state that can be gathered by kind and name (the engine)."""

    kinds: tuple[str, ...]

    @property
    def parameter_count(self) -> int:
        """Numbers of each kind."""
        ...

    def gather(self, kind: str, *, to: int | None) -> dict[str, Tensor]:
        """Whole fp32 tensors on the host by parameter name, on rank `to`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a run at one moment, without its tensors."""

    images_seen: int
    #: Updates, skipped steps and the loss scaler, as `Engine.scalars` gives them.
    engine: dict[str, Any]
    #: What an adaptive timestep sampler has learned.
    timesteps: dict[str, Any]
    #: The running means and counts of the guards; empty in checkpoints of earlier releases.
    guards: dict[str, Any]
    #: What makes the order of the data, compared on resume.
    order: dict[str, Any]
    #: The config that it was trained with, as TOML; empty in checkpoints of earlier releases.
    config: str
    #: For people: how many ranks wrote it, and by what, as `trainer.common.running` names it.
    ranks: int
    software: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Its entries in a checkpoint's state.json, where the clock is called "images"."""
        entries = dict(vars(self))
        return {"images": entries.pop("images_seen"), **entries}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> "TrainState":
        """Read the entries back; ValueError where one is missing or of another type."""
        kinds = {"images": int, "engine": dict, "timesteps": dict, "order": dict}
        for name, kind in kinds.items():
            found = entries.get(name)
            check(type(found) is kind, name, found, f"of type {kind.__name__}")
        return cls(
            images_seen=entries["images"],
            engine=entries["engine"],
            timesteps=entries["timesteps"],
            guards=entries.get("guards", {}),
            order=entries["order"],
            config=entries.get("config", ""),
            ranks=entries.get("ranks", 0),
            # Earlier releases recorded the version of torch alone.
            software=entries.get("software", {n: v for n, v in entries.items() if n == "torch"}),
        )
