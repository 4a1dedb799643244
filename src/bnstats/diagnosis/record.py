"""Recording the four batch statistics of BatchNorm layers in every training iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnstats.arguments import check_module
from bnstats.contexts import reusable
from bnstats.errors import InvalidTypeError, InvalidValueError, UnknownLayerError
from bnstats.formatting import counted, describe_mapping
from bnstats.hooks import Hook, given_input
from bnstats.masked_reduction import count_positions, masked_mean_and_m2
from bnstats.masks import given_mask
from bnstats.private import in_backward_pass
from bnstats.reduction import along_channels, mean_and_m2, other_axes
from bnstats.traversal import check_layer, named_layers


class Normalization(NamedTuple):
    """What a training forward normalized with: ``y = ratio (x - mean) / sqrt(var + eps)``.

    A layer that does not normalize by the batch's own mean and variance has a method
    ``last_normalization(mean, var)``, which is given these two of its latest training forward and
    returns the three, each of shape (C,).
    """

    mean: Tensor
    var: Tensor
    ratio: Tensor


class _Iteration:
    """One training forward of one layer; its backward adds ``g`` and ``psi``."""

    def __init__(self, normalization: Normalization) -> None:
        self.normalization = normalization
        self.g = torch.full_like(normalization.mean, torch.nan)
        self.psi = torch.full_like(normalization.mean, torch.nan)


_Awaiting = tuple[Tensor, _Iteration, Tensor | None]  # the input's mean, the row and the mask


class LayerRecord:
    """The batch statistics of one layer, each of shape (iterations, C), float64.

    With x the layer's input, y its normalized value before weight and bias, L the loss, and E
    the average over the values of a batch:

    Attributes:
        mean: the mean that normalized: E[x] for ``nn.BatchNorm``.
        var: the biased variance that normalized.
        g: E[dL/dy]; NaN for a forward without a backward.
        psi: E[y dL/dy]; the same.

    Example:
        >>> import torch, bnstats
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> with bnstats.record_batch_stats(layer) as record:
        ...     layer(torch.tensor([[1.0], [3.0]])).sum().backward()
        >>> [getattr(record[""], name).item() for name in ("mean", "var", "g", "psi")]
        [2.0, 1.0, 1.0, 0.0]
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.iterations: list[_Iteration] = []
        self.awaiting: list[_Awaiting] = []

    def __len__(self) -> int:
        return len(self.iterations)

    @property
    def mean(self) -> Tensor:  # noqa: D102
        return self._stack([row.normalization.mean for row in self.iterations])

    @property
    def var(self) -> Tensor:  # noqa: D102
        return self._stack([row.normalization.var for row in self.iterations])

    @property
    def g(self) -> Tensor:  # noqa: D102
        return self._stack([row.g for row in self.iterations])

    @property
    def psi(self) -> Tensor:  # noqa: D102
        return self._stack([row.psi for row in self.iterations])

    def __repr__(self) -> str:
        channels = len(self.iterations[0].normalization.mean) if self.iterations else "unknown"
        return f"LayerRecord({self.name!r}, iterations={len(self)}, channels={channels})"

    def _stack(self, rows: list[Tensor]) -> Tensor:
        if not rows:
            raise InvalidValueError(
                f"layer '{self.name}' ran no training forward while it was recorded"
            )
        return torch.stack(rows).double().cpu()


class BatchStatsRecord(Mapping[str, LayerRecord]):
    """A mapping from layer name to :class:`LayerRecord`, in the order of the model.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1))
        >>> with bnstats.record_batch_stats(model) as record:
        ...     _ = model(torch.randn(4, 1))
        >>> record
        BatchStatsRecord of 2 layers
        {'0': LayerRecord('0', iterations=1, channels=1),
         '1': LayerRecord('1', iterations=1, channels=1)}
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = {name: LayerRecord(name) for name in layers}

    def __getitem__(self, name: str) -> LayerRecord:
        if name not in self._layers:
            raise UnknownLayerError(name, self._layers)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"BatchStatsRecord of {counted(len(self), 'layer')}\n{describe_mapping(self)}"


@reusable
def record_batch_stats(
    model: nn.Module, layers: Iterable[str] | None = None
) -> Iterator[BatchStatsRecord]:
    """Record what batch normalization does in training: mean, variance, g and Psi of each batch.

    Four statistics of a batch take part in batch normalization: its mean and variance in the
    forward, ``g = E[dL/dy]`` and ``Psi = E[y dL/dy]`` in the backward. Their changes from
    batch to batch are the noise that makes small batches harmful: this is the tool behind
    Figure 2 of the MABN paper. Under a mask they are those of the valid positions. Every
    training forward of a layer is an iteration. Under activation checkpointing a forward counts
    once.

    It keeps five numbers per channel and iteration on the layer's device, and each layer's input
    until its backward. It takes the batch's statistics once more in the forward, and two passes
    over the input in the backward; benchmarks/results/cpu/diagnose.md has it for a ResNet-18.

    Args:
        model: any Module; wrappers are seen through. Open the context before the first call of
            a compiled part: compiled code does not notice new hooks.
        layers: names of BatchNorm layers; by default all, with running statistics or without.

    Yields:
        A mapping from layer name to its record, filled while the context is open. The hooks are
        removed when it closes, also after an error.

    Raises:
        InvalidValueError: no BatchNorm layers, or ``layers`` empty.
        UnknownLayerError: no BatchNorm layer of that name; the message suggests the nearest.
        InvalidTypeError: not a Module, a lazy layer, or ``layers`` a single string.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> with bnstats.record_batch_stats(model) as record:
        ...     for x in torch.randn(5, 8, 4):
        ...         model(x).square().mean().backward()
        >>> record["1"].psi.shape
        torch.Size([5, 3])

    References:
        Yan et al. (2020), "Towards Stabilizing Batch Statistics in Backward Propagation of
        Batch Normalization", arXiv:2001.06838, section 3 and Figure 2.
    """
    check_module(model, layers, "model, layers")
    chosen = _choose(model, layers)
    record = BatchStatsRecord(chosen)
    hooks = []
    try:
        for name, layer in chosen.items():
            hooks += _hook(layer, partial(_observe, record[name]))
        yield record
    finally:
        for handle in hooks:
            handle.remove()


def _choose(model: nn.Module, names: Iterable[str] | None) -> dict[str, _BatchNorm]:
    if isinstance(names, str):
        raise InvalidTypeError(f"layers: expected several names, got one: use [{names!r}]")
    found: dict[str, _BatchNorm] = {}
    for name, module in named_layers(model):
        if isinstance(module, _BatchNorm):
            check_layer(name, module)
            found[name] = module
    if not found:
        raise InvalidValueError(f"{type(model).__name__} has no BatchNorm layers to record")
    if names is None:
        return found
    names = list(names)
    if not names:
        raise InvalidValueError("layers: expected at least one name, or None for all layers")
    for name in names:
        if name not in found:
            raise UnknownLayerError(name, found)
    return {name: found[name] for name in names}


def _hook(layer: _BatchNorm, observe: Callable[..., None]) -> list[RemovableHandle]:
    """Call ``observe(layer, args, kwargs, output)`` when a forward of the layer has normalized."""
    drop = layer._modules.get("drop")
    if drop is None:
        return [layer.register_forward_hook(Hook(observe), with_kwargs=True)]
    # timm's layers drop out and activate what they have normalized.
    called: list[Any] = []
    return [
        layer.register_forward_pre_hook(Hook(lambda *call: called.append(call)), with_kwargs=True),
        drop.register_forward_pre_hook(Hook(lambda _, args: observe(*called.pop(), *args))),
    ]


def _observe(
    record: LayerRecord,
    layer: _BatchNorm,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> None:
    """Record a forward's statistics, and register a hook for its gradient's."""
    x: Tensor = given_input(args, kwargs)
    if not layer.training or x.numel() == 0:
        return
    given = given_mask(layer, args, kwargs)
    valid = None if given is None else given.fit(x)
    if not in_backward_pass():
        row = _Iteration(_normalization(layer, x, valid))
        record.iterations.append(row)
        if not output.requires_grad:
            # A checkpointed forward: its gradient arrives at the forward that runs again.
            record.awaiting.append((mean_and_m2(x.detach())[0], row, valid))
            return
    elif output.requires_grad and record.awaiting:
        _, row, valid = _pop_same(record.awaiting, mean_and_m2(x.detach())[0])
    else:
        return
    weight = None if layer.weight is None else layer.weight.detach()
    # x is saved by the layer for its own backward: it is still what it was by then. The output
    # may have been overwritten by an activation in place.
    output.register_hook(partial(_take_gradient, row, layer.eps, weight, x.detach(), valid))


def _pop_same(awaiting: list[_Awaiting], mean: Tensor) -> _Awaiting:
    """Take out the forward with this mean of its input; of several alike, the latest."""
    distances = torch.stack([(mean - other).norm() for other, *_ in awaiting]).flip(0)
    return awaiting.pop(len(awaiting) - 1 - int(distances.argmin()))


def _normalization(layer: _BatchNorm, x: Tensor, valid: Tensor | None) -> Normalization:
    count: int | Tensor = x.numel() // x.shape[1]
    if valid is None:
        mean, m2 = mean_and_m2(x.detach())
    else:
        count, mean, m2 = masked_mean_and_m2(x.detach(), valid)
    own = getattr(layer, "last_normalization", lambda *moments: (*moments, torch.ones_like(mean)))
    return Normalization(*own(mean, m2 / count))


@torch.no_grad()
def _take_gradient(
    row: _Iteration,
    eps: float,
    weight: Tensor | None,
    x: Tensor,
    valid: Tensor | None,
    gradient: Tensor,
) -> None:
    """Average ``dL/dy`` and ``y dL/dy``, where ``dL/dy = weight dL/d output``."""
    mean, var, ratio = row.normalization
    axes = other_axes(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    gradient = gradient.to(wide)
    count: int | Tensor = x.numel() // x.shape[1]
    if valid is not None:
        gradient, count = torch.where(valid, gradient, 0), count_positions(valid, x)
    centered = x.to(wide) - along_channels(mean.to(wide), x)
    scale = torch.ones_like(mean) if weight is None else weight.to(mean)
    # Several backwards through one forward add up.
    row.g = row.g.nan_to_num(0) + scale * gradient.sum(axes) / count
    psi = scale * ratio * (var + eps).rsqrt() * centered.mul_(gradient).sum(axes) / count
    row.psi = row.psi.nan_to_num(0) + psi
