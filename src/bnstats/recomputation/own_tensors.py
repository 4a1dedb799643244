"""A model's own parameters and buffers, where forwards run side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnstats.errors import InvalidValueError
from bnstats.recomputation.observer import ObservedLayer


class OwnTensors:
    """A context that keeps the tensors of a model whose forward may replace them meanwhile.

    ``torch.func.functional_call`` does: it puts others in their place, and puts back what it
    found. Of two such forwards side by side, one computes with the other's, and the one that ends
    last may put back the other's.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [
            module
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)  # whose tensors nobody replaces
        ]
        self._parameters = _entries(module._parameters for module in modules)
        self._buffers = _entries(module._buffers for module in modules)

    def check(self, layer: ObservedLayer) -> None:
        """Refuse a forward that has replaced a parameter by the time that it reaches a layer.

        Not one that has loaded what was offloaded to the meta device.
        """
        for now, key, own in self._parameters:
            if now.get(key) is not own and not (own is None or own.is_meta):
                raise InvalidValueError(
                    f"layer '{layer.name}': the forward replaces the model's parameters while it "
                    "runs (as torch.func.functional_call does), and forwards run side by side with "
                    'method="layerwise"; use method="sweeps", which runs one at a time'
                )

    def __enter__(self) -> None:
        """Begin: the tensors are the model's own."""

    def __exit__(self, *_: object) -> None:
        """Put back every tensor that is not."""
        for now, key, own in (*self._parameters, *self._buffers):
            now[key] = own


def _entries(found: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], str, Any]]:
    return [(tensors, key, tensor) for tensors in found for key, tensor in tensors.items()]
