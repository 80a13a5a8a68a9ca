"""The weights that the network computes with: copies of fp32 state in the training's precision.

DeepSpeed makes them from the fp32 masters after every step. They can also be made from an average,
so that a grid needs no second network, and from masters that a rollback has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.adm.unet import build
from trainer.config.experiment import Config
from trainer.engine import compute


class Copies:
    """The copies that DeepSpeed's `optimizer` keeps in `parameters`, by name.

    All ranks must call each method together.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, Any]) -> None:
        self._optimizer = optimizer
        self._parameters = dict(parameters)

    @torch.no_grad()
    def make(self, masters: Sequence[Tensor]) -> None:
        """Make the copies from the masters, this rank's flat fp32 partitions."""
        if hasattr(self._optimizer, "update_lp_params"):
            self._optimizer.update_lp_params()
            return
        self._optimizer._partition_all_parameters()
        for number in range(len(masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if kept_whole := self._optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)

    @torch.no_grad()
    def make_from(self, masters: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Make the copies from `states`, partitions of another kind; the masters stay."""
        pairs = list(zip(masters, states, strict=True))
        for master, state in pairs:
            master.data, state.data = state.data, master.data
        try:
            self.make(masters)
        finally:
            for master, state in pairs:
                master.data, state.data = state.data, master.data

    @contextmanager
    def whole(self) -> Iterator[dict[str, Tensor]]:
        """The copies, whole and on the device, by parameter name, while entered.

        An error that leaves it ends the run: they stay whole.
        """
        parameters = list(self._parameters.values())
        # In stage 3 each rank has a part of most of them.
        parts = [p for p in parameters if hasattr(p, "ds_id") and p.data.numel() != p.ds_numel]
        if parts:
            parts[0].all_gather(parts)
        yield {name: p.data for name, p in self._parameters.items()}
        if parts:
            parts[0].partition(parts, has_been_updated=False)


def network_of(config: Config, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network whose parameters are these tensors themselves: it takes no memory of its own.

    It computes where they are, as the training does, but uncompiled.
    """
    with torch.device("meta"):
        net = build(config.model)
    net.load_state_dict(dict(weights), assign=True)
    device = next(net.parameters()).device
    return compute.prepare(net, training=config.training, device=device)
