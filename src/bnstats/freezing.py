"""Layers that normalize with their running statistics in every mode of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from bnstats.errors import warn
from bnstats.traversal import Include, named_batchnorms, no_batchnorm

M = TypeVar("M", bound=nn.Module)


def freeze_statistics(model: M, include: Include | None = None) -> M:
    """Normalize with the running statistics, also after ``model.train()``, in place.

    Fine-tuning on few images, or on batches too small for statistics of their own, keeps those
    that the model came with. Frozen layers stay in evaluation mode: running statistics and
    counters do not move, weight and bias still learn. That is part of the layer. It is copied and
    pickled with it, conversion to another family and back keeps it, replicas and compiled code
    see it. :func:`recompute_population_stats` leaves a frozen layer alone and names it in its
    result. :func:`thaw_statistics` ends it.

    Args:
        model: any Module; wrappers are seen through.
        include: ``include(name, module) -> bool`` chooses layers; by default all BatchNorm layers
            with running statistics.

    Returns:
        The model.

    Raises:
        InvalidTypeError: not a Module, or a lazy layer not yet materialized.

    Warns:
        BnstatsWarning: there is no such layer.

    Note:
        What makes new layers from old ones loses it, ``SyncBatchNorm.convert_sync_batchnorm`` for
        one: convert first. A state dict has no modes: freeze again after loading one into
        another model. ``torch.optim.swa_utils.update_bn`` resets every layer's statistics first:
        thaw before. Code that sets ``layer.training = True`` by itself is not stopped.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> model = bnstats.freeze_statistics(model).train()
        >>> output = model(torch.randn(8, 4))
        >>> int(model[1].num_batches_tracked), output.requires_grad
        (0, True)
    """
    layers = named_batchnorms(model, include)
    if not layers:
        warn(f"{no_batchnorm(model, include)}: nothing to freeze")
    for layer in layers.values():
        if not is_frozen(layer):
            vars(layer)["train"] = _Frozen(layer)
            layer.training = False
    return model


def thaw_statistics(model: M, include: Include | None = None) -> M:
    """End what :func:`freeze_statistics` began, in place.

    A layer is then in the mode that it would be in had it not been frozen: the one that
    ``train()`` or ``eval()`` last asked for. A layer that is not frozen stays as it is.

    Args:
        model: any Module; wrappers are seen through.
        include: ``include(name, module) -> bool`` chooses layers; by default all BatchNorm layers
            with running statistics.

    Returns:
        The model.

    Raises:
        InvalidTypeError: not a Module, or a lazy layer not yet materialized.

    Warns:
        BnstatsWarning: there is no such layer, frozen or not.

    Example:
        >>> import torch, bnstats
        >>> model = bnstats.freeze_statistics(torch.nn.BatchNorm1d(3))
        >>> model.train().training, bnstats.thaw_statistics(model).training
        (False, True)
    """
    layers = named_batchnorms(model, include)
    if not layers:
        warn(f"{no_batchnorm(model, include)}: nothing to thaw")
    for layer in layers.values():
        frozen = vars(layer).get("train")
        if isinstance(frozen, _Frozen):
            del vars(layer)["train"]
            layer.training = frozen.mode
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether :func:`freeze_statistics` holds a layer in evaluation mode."""
    return isinstance(vars(layer).get("train"), _Frozen)


def frozen_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Name the layers that are frozen, or in evaluation mode while the model trains."""
    return tuple(
        name for name, x in layers.items() if is_frozen(x) or (model.training and not x.training)
    )


class _Frozen:
    """Stands for a layer's ``train``, which ``Module.train`` and ``eval`` call for each child.

    It is an attribute of the layer, so copies, pickles and conversions of the layer keep it.

    Attributes:
        mode: the mode that was last requested.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.mode = layer.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """Keep the mode for later; modules inside the layer, such as an activation, take it now."""
        layer = self._layer
        type(layer).train(layer, mode)
        self.mode, layer.training = layer.training, False
        return layer
