"""The public functions: convert a model's BatchNorm layers, and revert them."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypeVar, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.arguments import check_function, check_module
from bnstats.conversion.centering import Recentering, plan_centering, plan_folding
from bnstats.conversion.change import Change, check_options, plan
from bnstats.conversion.families import CENTERED, FAMILIES, PLAIN, family_of
from bnstats.distributed import Sync
from bnstats.errors import InvalidTypeError, InvalidValueError, warn
from bnstats.layers.moving_average_state import far_from_zero
from bnstats.traversal import Include, check_layer, named_layers

M = TypeVar("M", bound=nn.Module)

Target: TypeAlias = Literal["ema", "cumulative", "moving_average", "renorm"]


# The options of each family, for type checkers and editors.
@overload
def convert_batchnorm(
    model: M,
    to: Literal["ema"],
    *,
    include: Include | None = None,
    momentum: float | None = ...,
    sync: Sync = ...,
    debias: bool = ...,
    pooled: bool = ...,
) -> M: ...
@overload
def convert_batchnorm(
    model: M,
    to: Literal["cumulative"],
    *,
    include: Include | None = None,
    momentum: float | None = ...,
    sync: Sync = ...,
) -> M: ...
@overload
def convert_batchnorm(
    model: M,
    to: Literal["moving_average"],
    *,
    include: Include | None = None,
    momentum: float | None = ...,
    sync: Sync = ...,
    window: int = ...,
    warmup: int = ...,
    renorm_warmup: int = ...,
    max_ratio: float = ...,
    center: bool = ...,
) -> M: ...
@overload
def convert_batchnorm(
    model: M,
    to: Literal["renorm"],
    *,
    include: Include | None = None,
    momentum: float | None = ...,
    sync: Sync = ...,
    warmup: int = ...,
    ramp: int = ...,
    max_ratio: float = ...,
    max_shift: float = ...,
    debias: bool = ...,
    pooled: bool = ...,
) -> M: ...
def convert_batchnorm(model: M, to: Target, *, include: Include | None = None, **options: Any) -> M:
    """Make the BatchNorm layers of a model those of a family, in place.

    Served are torch's ``BatchNorm1d/2d/3d``, ``SyncBatchNorm``, which becomes the family's base
    class, synchronized over the same processes, and the layers of other families. They stay the
    same objects, with the same Parameters and buffers, hooks, training flag, eps and momentum.
    Names and order of sub-modules, parameters and state-dict keys do not change, but for the
    buffers that a family adds. An optimizer built before goes on; so do
    DistributedDataParallel and torch.compile, which are seen through. torch.fx records each layer
    as one node, as it does torch's, and torch.export exports it.

    What the running statistics go on from:

    - ``"ema"``, ``"renorm"``: they go on as an average. Statistics that are not the initial
      ones and that no batch was counted for are taken as one that has forgotten its start (see
      :class:`EMABatchNorm`). The model evaluates to the same bits.
    - ``"cumulative"``: ``num_values_tracked`` is 0. The statistics serve evaluation, to the
      same bits, until the first training batch replaces them.
    - ``"moving_average"``: about zero, ``running_var + running_mean^2``, with empty windows.
      Every convolution (no transposed one) becomes its centered twin, and every ``nn.Linear``
      whose output goes straight into a converted layer: by the graph that torch.fx traces, or,
      where it cannot trace the model, as neighbours in an ``nn.Sequential``. One whose class
      has a forward of its own, "same" padding for example, gets a class derived from its
      own, whose forward reads ``self.weight`` centered. A layer with a
      single weight to an output stays: centered, it would be 0. A trained model evaluates
      differently then, and is to be trained further.

    A layer that is of the family already keeps its state and takes the options: converting
    twice is converting once. Another ``window`` empties the windows.

    Args:
        model: any Module.
        to: ``"ema"``, ``"cumulative"``, ``"moving_average"`` or ``"renorm"``.
        include: ``include(name, module) -> bool`` chooses layers, those to be centered too; the
            others stay as they are. A layer in several places goes by the first one's name.
        **options: keyword-only arguments of the family's class (for ``"ema"`` ``debias`` and
            ``pooled``, for ``"moving_average"`` ``window`` and others), by default its
            defaults; ``sync``, the processes to synchronize over, by default each layer's own;
            ``momentum``, by default each layer's own (small batches under ``"moving_average"``
            want 0.02); ``center=False`` for ``"moving_average"`` leaves convolutions and linear
            layers as they are.

    Returns:
        The model.

    Raises:
        InvalidValueError: an unknown family, a value that the family's class refuses.
        InvalidTypeError: not a Module; an option that the family does not have; a lazy layer
            not yet materialized; a batch norm whose class replaces a method of torch's layer by
            its own, ``forward`` for example, or an attribute by a property, which the conversion
            would drop (timm's classes are known, see below); a layer to be centered that has a
            property ``weight``, or a forward set on the object; one with ``__slots__``, whose
            objects cannot change their class. Helpers under other names are accepted; the
            converted layer lacks them. The message names the layer; the model is unchanged.

    Warns:
        BnstatsWarning: there is nothing to convert; a layer with a mean becomes one without; a
            ``momentum`` above 0.5 is passed, which may be Keras's. A layer's own is not warned of.

    Note:
        ``nn.SyncBatchNorm.convert_sync_batchnorm`` comes first, and this function second; or
        this one alone, with ``sync=True``. On a converted model torch's would put plain layers
        in the place of these, which they warn of, and leave centered layers as they are.

        timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` become layers of the family that drop
        out and activate as theirs do (:mod:`bnstats.integrations.timm`). On the way back every
        layer becomes one of the class that it came from.

        A subclass can declare what it becomes: a class method
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
    check_module(model, to, "model, to")
    _check_target(to)
    center = _take_center(to, options)
    check_options(to, options)
    layers = _chosen_batchnorms(model, include)
    changes: list[Change | Recentering] = [
        plan(name, layer, to, options) for name, layer in layers.items()
    ]
    if center and layers:
        changes += plan_centering(model, include, layers.values())
    _warn(model, layers, to, include)
    for change in changes:
        change.apply()
    return model


def revert_batchnorm(model: M) -> M:
    """Make this package's layers plain ``nn.BatchNorm1d/2d/3d`` again, in place.

    The way back from :func:`convert_batchnorm`; it also works on models that were built with
    these layers. Afterwards the tools that know only torch's own classes (ONNX, TorchScript,
    quantization, fusion) accept the model. All that conversion keeps is kept, and the model
    evaluates to the same bits. Centered layers become plain ones, their weights centered in
    place.

    A family's base class becomes ``SyncBatchNorm``, torch's only one for any dimension, of the
    same process group. A synchronized ``...2d`` layer becomes ``nn.BatchNorm2d``, which is not.
    Layers that are not this package's stay as they are.
    What conversion changed on request is not undone: a ``momentum``, statistics about zero.

    Args:
        model: any Module.

    Returns:
        The model.

    Raises:
        InvalidTypeError: not a Module; a layer whose class replaces methods of torch's and does not
            declare what it becomes. The message names the layer; the model is unchanged.
        InvalidValueError: a centered layer whose weight is computed (a parametrization, weight
            norm, pruning), or is also that of a layer that is not centered.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bnstats.EMABatchNorm1d(3))
        >>> [type(layer).__name__ for layer in bnstats.revert_batchnorm(model)]
        ['Linear', 'BatchNorm1d']
    """
    changes: list[Change | Recentering] = [
        plan(name, module, PLAIN, {})
        for name, module in named_layers(model)
        if isinstance(module, _BatchNorm) and family_of(module) not in (None, PLAIN)
    ]
    for change in [*changes, *plan_folding(model)]:
        change.apply()
    return model


def _check_target(to: str) -> None:
    targets = [family for family in FAMILIES if family != PLAIN]
    if not isinstance(to, str):
        came = type(to).__name__
        if isinstance(to, type):
            named = [family for family in targets if to in FAMILIES[family]]
            came = f"the class {to.__name__}" + "".join(f": pass {family!r}" for family in named)
        raise InvalidTypeError(f"to: expected one of {targets}, got {came}")
    if to not in targets:
        raise InvalidValueError(
            f"to: expected one of {targets}, got {to!r}; revert_batchnorm is the way back"
        )


def _take_center(to: str, options: dict[str, Any]) -> bool:
    """Return whether to center layers too; it is no option of the batch norms."""
    center = options.pop("center", True) if to == CENTERED else False
    if not isinstance(center, bool):
        raise InvalidTypeError(f"center: expected True or False, got {type(center).__name__}")
    return center


def _chosen_batchnorms(model: nn.Module, include: Include | None) -> dict[str, _BatchNorm]:
    check_function("include", include, "name, module")
    layers: dict[str, _BatchNorm] = {}
    for name, module in named_layers(model):
        if isinstance(module, _BatchNorm) and (include is None or include(name, module)):
            check_layer(name, module)
            layers[name] = module
    return layers


def _warn(
    model: nn.Module, layers: dict[str, _BatchNorm], to: str, include: Include | None
) -> None:
    """Warn of consequences that are rarely wanted, before anything changes."""
    if not layers:
        chosen = "" if include is None else " that include chooses"
        warn(f"{type(model).__name__} has no BatchNorm layer{chosen}: nothing to convert")
    with_mean = [
        name
        for name, layer in layers.items()
        if to == CENTERED
        and layer.running_mean is not None
        and layer.running_var is not None
        and far_from_zero(layer.running_mean, layer.running_var, layer.eps)
    ]
    if with_mean:
        warn(
            f"the model will evaluate differently: {to!r} has no mean, and these layers have one "
            "that is not near zero; they go on from running_var + running_mean^2, to be trained "
            f"further: {_list(with_mean)}"
        )


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))
