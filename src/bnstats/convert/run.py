"""The public functions: convert a model's BatchNorm layers, and revert them."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.convert.change import check_options, plan
from bnstats.convert.families import FAMILIES, PLAIN, family_of
from bnstats.errors import BnstatsWarning, InvalidTypeError, InvalidValueError
from bnstats.traversal import Include, check_materialized, named_layers

M = TypeVar("M", bound=nn.Module)


def convert_batchnorm(model: M, to: str, *, include: Include | None = None, **options: Any) -> M:
    """Make the BatchNorm layers of a model those of a family, in place.

    Served are torch's ``BatchNorm1d/2d/3d``, ``SyncBatchNorm``, which becomes the family's base
    class, and the layers of other families. They stay the same objects, with the same
    Parameters and buffers, hooks, training flag, eps and momentum, and the model evaluates to
    the same bits. Names and order of sub-modules, parameters and state-dict keys do not change.
    An optimizer built before goes on; so do DistributedDataParallel and torch.compile, which
    are seen through.

    What the running statistics go on from: ``"ema"`` goes on averaging. Statistics that are not
    the initial ones and that no batch was counted for are taken as an average that has
    forgotten its start (see :class:`EMABatchNorm`). ``"cumulative"`` starts at
    ``num_values_tracked = 0``: the statistics serve evaluation until the first training batch
    replaces them.

    A layer that is of the family already keeps its state and takes the options: converting
    twice is converting once.

    Args:
        model: any Module.
        to: ``"ema"`` or ``"cumulative"``.
        include: ``include(name, module) -> bool`` chooses layers; the others stay as they are.
            A layer that stands in several places goes by the first one's name.
        **options: keyword-only arguments of the family's class (for ``"ema"`` ``debias`` and
            ``pooled``), by default its defaults, and ``momentum``, by default each layer's own.

    Returns:
        The model.

    Raises:
        InvalidValueError: an unknown family, a value that the family's class refuses.
        InvalidTypeError: not a Module; an option that the family does not have; a lazy layer
            not yet materialized; a layer whose class overrides a method of its BatchNorm, which
            the conversion would drop (timm's ``BatchNormAct2d`` activates in its forward).
            The message has the layer's name; the model is as before.

    Warns:
        BnstatsWarning: there is nothing to convert; a SyncBatchNorm that does synchronize
            becomes a layer that does not.

    Note:
        The author of a subclass can say what it becomes: a class method
        ``__bnstats_class__(to)`` returns the class for the family ``to``, or for ``"plain"`` on
        the way back, or None for none. The class returned derives from the family's
        (from torch's for ``"plain"``). Its constructor is not called: the layer keeps its
        attributes and gets those of the family beside them::

            class ActivatedBatchNorm2d(nn.BatchNorm2d):
                def forward(self, x):
                    return super().forward(x).relu()

                @classmethod
                def __bnstats_class__(cls, to):
                    return {"ema": ActivatedEMA2d, "plain": ActivatedBatchNorm2d}.get(to)

            class ActivatedEMA2d(ActivatedBatchNorm2d, bnstats.EMABatchNorm2d):
                pass

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model = bnstats.convert_batchnorm(model, "ema", pooled=False)
        >>> type(model[1]).__name__, model[1].debias, model[1].pooled
        ('EMABatchNorm1d', True, False)
    """
    _check_target(to)
    check_options(to, options)
    layers = _chosen_batchnorms(model, include)
    if not layers:
        warnings.warn(
            f"{type(model).__name__} has no BatchNorm layer"
            + ("" if include is None else " that include chooses"),
            BnstatsWarning,
            stacklevel=2,
        )
    changes = [plan(name, layer, to, options) for name, layer in layers.items()]
    _warn_of_lost_synchronization(layers)
    for change in changes:
        change.apply()
    return model


def revert_batchnorm(model: M) -> M:
    """Make this package's layers plain ``nn.BatchNorm1d/2d/3d`` again, in place.

    The way back from :func:`convert_batchnorm`, and the way out for layers that a model was
    built with: what knows only torch's own classes (export, TorchScript, quantization, fusion)
    takes the model then. It evaluates to the same bits; all that conversion keeps is kept. A
    family's base class becomes ``SyncBatchNorm``, torch's only one for any dimension, with the
    process group that it came with. Layers that are not this package's stay as they are.

    Args:
        model: any Module.

    Returns:
        The model.

    Raises:
        InvalidTypeError: not a Module; a layer whose class overrides a method of its family's
            and does not say what it becomes. The message has the layer's name; the model is as
            before.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bnstats.EMABatchNorm1d(3))
        >>> bnstats.revert_batchnorm(model)[1]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    changes = [
        plan(name, module, PLAIN, {})
        for name, module in named_layers(model)
        if isinstance(module, _BatchNorm) and family_of(module) not in (None, PLAIN)
    ]
    for change in changes:
        change.apply()
    return model


def _check_target(to: str) -> None:
    targets = [family for family in FAMILIES if family != PLAIN]
    if not isinstance(to, str):
        raise InvalidTypeError(f"to: expected one of {targets}, got {type(to).__name__}")
    if to not in targets:
        raise InvalidValueError(
            f"to: expected one of {targets}, got {to!r}; revert_batchnorm is the way back"
        )


def _chosen_batchnorms(model: nn.Module, include: Include | None) -> dict[str, _BatchNorm]:
    if include is not None and not callable(include):
        raise InvalidTypeError(
            f"include: expected a callable or None, got {type(include).__name__}"
        )
    layers: dict[str, _BatchNorm] = {}
    for name, module in named_layers(model):
        if isinstance(module, _BatchNorm) and (include is None or include(name, module)):
            check_materialized(name, module)
            layers[name] = module
    return layers


def _warn_of_lost_synchronization(layers: dict[str, _BatchNorm]) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    lost = [name for name, layer in layers.items() if isinstance(layer, nn.SyncBatchNorm)]
    if lost:
        warnings.warn(
            "these layers normalized by the batch of all processes, and now do by each "
            f"process's own: {', '.join(map(repr, lost))}",
            BnstatsWarning,
            stacklevel=3,
        )
