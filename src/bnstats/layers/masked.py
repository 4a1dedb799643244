"""Masks for all layers of a model at once."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.arguments import check_module
from bnstats.contexts import reusable
from bnstats.errors import InvalidValueError
from bnstats.layers.base import RunningStatsBatchNorm
from bnstats.masks import Downsample, Mask, check_downsample, check_mask
from bnstats.traversal import named_layers


@reusable
def masked(model: nn.Module, mask: Tensor, downsample: Downsample = None) -> Iterator[None]:
    """Let padding count for nothing in the batch statistics of a model's layers.

    In training forwards inside the context, batch statistics, their gradients, running
    statistics and windows are those of the valid positions alone. Every position is normalized.
    In evaluation, where running statistics normalize, a mask has no effect. Masks do not change
    what other layers do: a convolution reads padding beside valid positions, so set padding to 0
    before each of them if valid outputs are not to depend on it.

    Contexts nest, the inner mask counts, and may end in any order. A backward may come after the
    context, also where activation checkpointing runs a forward again there: it gets the mask that
    it had. Around compiled code that is checkpointed, run it inside.

    Args:
        model: any Module with this package's layers; wrappers are seen through.
        mask: boolean, of the shape of the layers' input without its channel axis, (N, L) for
            inputs of shape (N, C, L) for example, or broadcastable to it; True for positions
            that count.
        downsample: for layers with fewer positions than the mask. ``"any"``: a position is
            valid if any in its block of the mask is (blocks as in ``adaptive_max_pool``);
            ``"all"``: if all are; a function ``(mask, size) -> mask`` for the sizes of the
            spatial axes; None: such a layer is an error.

    Raises:
        InvalidValueError: a layer of torch's own in training mode, which takes no mask; no
            layer of this package; in a forward, a mask that does not fit a layer's input, or
            one without a valid position, on CPU and in eager mode. On a device, or in compiled
            code, the host does not wait to know: such a batch moves no statistic. The message
            has the layer's name.
        InvalidTypeError: not a Module, or a mask that is not boolean.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), bnstats.EMABatchNorm1d(3))
        >>> x, lengths = torch.randn(2, 2, 5), torch.tensor([5, 3])
        >>> with bnstats.masked(model, torch.arange(5) < lengths[:, None]):
        ...     _ = model(x)
        >>> values = torch.cat([model[0](x)[0], model[0](x)[1, :, :3]], dim=1)
        >>> bool(torch.allclose(model[1].running_mean, values.mean(1), atol=1e-6))
        True
    """
    check_module(model, mask, "model, mask")
    check_mask(mask, "mask")
    check_downsample(downsample)
    masks = {
        layer: Mask(mask, downsample, f"layer '{name}' ({type(layer).__name__})")
        for name, layer in _masked_layers(model).items()
    }
    try:
        for layer, given in masks.items():
            _given.setdefault(layer, []).append(given)
            layer._mask = given
        yield
    finally:
        for layer, given in masks.items():
            left = [other for other in _given.get(layer, ()) if other is not given]
            _given[layer] = left
            layer._mask = left[-1] if left else None


_given: WeakKeyDictionary[RunningStatsBatchNorm, list[Mask]] = WeakKeyDictionary()
"""The masks of all contexts that are open, the latest last: they may end in any order."""


def _masked_layers(model: nn.Module) -> dict[str, RunningStatsBatchNorm]:
    """Return the layers that take a mask, if there are such only."""
    layers: dict[str, RunningStatsBatchNorm] = {}
    for name, module in named_layers(model):
        if isinstance(module, RunningStatsBatchNorm):
            layers[name] = module
        elif isinstance(module, _BatchNorm) and module.training:
            raise InvalidValueError(
                f"masked: layer '{name}' ({type(module).__name__}) takes no mask: make it one of "
                "this package's with bnstats.convert_batchnorm, or put it in evaluation mode"
            )
    if not layers:
        raise InvalidValueError(
            f"masked: {type(model).__name__} has no layer that takes a mask: make its BatchNorm "
            "layers this package's with bnstats.convert_batchnorm"
        )
    return layers
