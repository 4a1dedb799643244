"""A model's own parameters and buffers, which its forward may replace or write to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.distributed import is_dtensor
from bnstats.errors import InvalidValueError
from bnstats.recomputation.observer import ObservedLayer


class OwnTensors:
    """A model's tensors as they are when this object is made, but for measured statistics.

    A forward may replace them. ``torch.func.functional_call`` does: it puts others in their place,
    and puts back what it found. Of two such forwards side by side, one computes with the other's,
    and the one that ends last may put back the other's. A model may also replace a buffer for
    good: a counter, a cache that grows.

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

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Put back every parameter that was replaced, and buffers that the model did not change."""
        try:
            yield
        finally:
            for now, key, own in self._parameters:
                now[key] = own
        for now, key, own, other in self._replaced_buffers():
            if torch.equal(other, own):
                now[key] = own

    def put_back_buffers(self) -> None:
        """Put back every buffer that was replaced or removed."""
        for now, key, own in self._buffers:
            if now.get(key) is None:
                now[key] = own
        for now, key, own, _ in self._replaced_buffers():
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


@contextmanager
def buffers_kept_on_failure(model: nn.Module, layers: Iterable[ObservedLayer]) -> Iterator[None]:
    """After any error, let the model's own buffers be as they were; else as the model left them.

    In evaluation mode too a model may write to them: a counter, a quantization observer.
    Measured running statistics are not among them: the measurement never writes to those.
    """
    tensors = OwnTensors(model, layers)
    measured = {id(x) for layer in layers for x in (layer.running_mean, layer.running_var)}
    with torch.inference_mode():
        saved = [
            (own, own.shape, _memory(own).clone())
            for own in model.buffers()
            if not (own.is_meta or own.is_nested or id(own) in measured)
        ]
    try:
        yield
    except BaseException:
        tensors.put_back_buffers()
        with torch.inference_mode():
            for own, shape, values in saved:
                if own.shape != shape:
                    own.resize_(shape)
                _write(_memory(own), values)
        raise


def _memory(tensor: Tensor) -> Tensor:
    """Return what can be written to in place, unseen by graphs that hold the tensor."""
    memory = (tensor.to_local() if is_dtensor(tensor) else tensor).data  # type: ignore[attr-defined]
    if memory.layout == torch.strided:
        for dim, stride in enumerate(memory.stride()):
            if stride == 0 and memory.shape[dim] > 1:  # it is expanded
                memory = memory.narrow(dim, 0, 1)
    return memory


def _write(memory: Tensor, values: Tensor) -> None:
    # A file that is mapped cannot be written to. On other devices, one that has no memory left can
    # write, but not compare.
    comparable = memory.is_cpu and memory.layout == torch.strided and memory.dtype == values.dtype
    if not (comparable and torch.equal(memory, values)):
        memory.copy_(values)


def _entries(tensors: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    return ((tensors, key, tensor) for key, tensor in tensors.items())


def _error(layer: ObservedLayer, what: str) -> InvalidValueError:
    return InvalidValueError(
        f"layer '{layer.name}': the forward replaces the model's {what} while it runs (as "
        "torch.func.functional_call does), and forwards run side by side with "
        'method="layerwise"; use method="sweeps", which runs one at a time'
    )
