"""A model's own parameters and buffers, where forwards run side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.errors import InvalidValueError
from bnstats.recomputation.observer import ObservedLayer


class OwnTensors:
    """A context that keeps the tensors of a model whose forward may replace them.

    ``torch.func.functional_call`` does: it puts others in their place, and puts back what it
    found. Of two such forwards side by side, one computes with the other's, and the one that ends
    last may put back the other's. A model may also replace a buffer for good: a counter, a cache
    that grows. Those it keeps, unless the measurement fails.

    Args:
        model: the model.
        layers: whose running statistics are replaced by the measurement itself.
    """

    def __init__(self, model: nn.Module, layers: Iterable[ObservedLayer]) -> None:
        modules = [
            module
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)  # whose tensors nobody replaces
        ]
        measured = {id(layer.module._buffers) for layer in layers}
        self._parameters = [entry for module in modules for entry in _entries(module._parameters)]
        self._buffers = [
            (buffers, key, own)
            for module in modules
            for buffers, key, own in _entries(module._buffers)
            if own is not None
            and not (id(buffers) in measured and key in ("running_mean", "running_var"))
        ]

    def check(self, layer: ObservedLayer) -> None:
        """Refuse a forward that has replaced a tensor by the time that it reaches a layer.

        Not one that has loaded what was offloaded to the meta device. Of buffers, those that other
        numbers of the same shape have replaced: batches that wait would go on with the latest.
        """
        for now, key, own in self._parameters:
            if now.get(key) is not own and not (own is None or own.is_meta):
                raise _error(layer, "parameters")
        for _, _, own, other in self._replaced_buffers():
            if own.is_floating_point() and not torch.equal(other, own):
                raise _error(layer, "buffers")

    def __enter__(self) -> None:
        """Begin: the tensors are the model's own."""

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Put back every parameter that was replaced, and buffers that the model did not change."""
        for now, key, own in self._parameters:
            now[key] = own
        for now, key, own, other in self._replaced_buffers():
            if error is not None or torch.equal(other, own):
                now[key] = own

    def _replaced_buffers(self) -> Iterator[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Yield where a buffer is, the model's own and what has replaced it, of the same kind.

        A module may rely on another shape, and what is on the meta device has no values.
        """
        for now, key, own in self._buffers:
            other = now.get(key)
            if other is own or other is None or own.is_meta:
                continue
            if other.shape == own.shape and other.dtype == own.dtype and other.device == own.device:
                yield now, key, own, other


def _entries(tensors: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    return ((tensors, key, tensor) for key, tensor in tensors.items())


def _error(layer: ObservedLayer, what: str) -> InvalidValueError:
    return InvalidValueError(
        f"layer '{layer.name}': the forward replaces the model's {what} while it runs (as "
        "torch.func.functional_call does), and forwards run side by side with "
        'method="layerwise"; use method="sweeps", which runs one at a time'
    )
