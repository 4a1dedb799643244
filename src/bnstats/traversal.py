"""Finding BatchNorm layers in a model, under the names that its user knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NoReturn, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bnstats.arguments import check_function, check_module
from bnstats.errors import InvalidTypeError, LayerMismatchError, UnknownLayerError
from bnstats.formatting import describe_mapping

T = TypeVar("T")

Include: TypeAlias = Callable[[str, nn.Module], bool]
"""Chooses layers by name and module."""


class ByLayer(dict[str, T]):
    """A dict by layer name; the error for a missing name suggests the nearest."""

    def __missing__(self, name: str) -> NoReturn:
        raise UnknownLayerError(name, self)

    def __repr__(self) -> str:
        return describe_mapping(self)


_SHARDED = "_fsdp_wrapped_module"

# torch's wrappers whose classes would be slow to import: torch.compile, FullyShardedDataParallel,
# activation checkpointing. Each uses a key that no other class uses.
_OWN_KEYS = ("_orig_mod", _SHARDED, "_checkpoint_wrapped_module")

# Averages of a model's weights, by package and class: bnstats depends on neither package.
_AVERAGES = {
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("ema_pytorch", "EMA"): "ema_model",
    ("ema_pytorch", "KarrasEMA"): "ema_model",
}


def inner_key(module: nn.Module) -> str | None:
    """Return under which key a wrapper keeps the model that it wraps; None for other modules."""
    if isinstance(module, (DistributedDataParallel, DataParallel, AveragedModel)):
        return "module"
    for key in _OWN_KEYS:
        if key in module._modules:
            return key
    return _average_key(module)


def is_average(value: object) -> bool:
    """Whether this is an average of a model's weights, of a known class."""
    if isinstance(value, nn.Module):
        return isinstance(value, AveragedModel) or _average_key(value) is not None
    return False


def _average_key(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        found = _AVERAGES.get((cls.__module__.partition(".")[0], cls.__name__))
        if found is not None and module._modules.get(found) is not None:
            return found
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel, torch.compile and the like.

    FullyShardedDataParallel stays: its forward gathers the parameters that the model runs with.
    """
    check_module(model)
    while (key := inner_key(model)) not in (None, _SHARDED):
        model = model.get_submodule(str(key))
    return model


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` for every module, each once, in the order of ``named_modules``.

    The name is that of the unwrapped model: a wrapper's key is not part of it. The root's is
    "", and a module in several places has the name of the first.
    """
    check_module(model)
    places = {"": ("", model)}
    for path, module in model.named_modules():
        if path:
            above, _, key = path.rpartition(".")
            name, parent = places[above]
            if key != inner_key(parent):
                name = f"{name}.{key}" if name else key
            places[path] = (name, module)
        yield places[path]


def named_batchnorms(model: nn.Module, include: Include | None = None) -> dict[str, _BatchNorm]:
    """Return the chosen layers with a BatchNorm's running statistics, each under its first name.

    By default those are the instances of torch's BatchNorm. ``include`` is also asked for
    modules of other classes that keep the same statistics, torchvision's FrozenBatchNorm2d for
    example; they are typed as BatchNorm.

    Raises:
        InvalidTypeError: model is not a Module, include no function of two arguments, or a layer
            is lazy and not yet materialized.
    """
    check_function("include", include, "name, module")
    layers: dict[str, _BatchNorm] = {}
    for name, module in named_layers(model):
        if isinstance(module, _BatchNorm):
            check_layer(name, module)
        elif include is None:
            continue
        if keeps_statistics(module) and (include is None or include(name, module)):
            layers[name] = cast("_BatchNorm", module)
    return layers


def names_of_modules(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each module, by the first, which is the one that results have."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {found[0]: found for found in names.values()}


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let modules be set to training or evaluation; on leaving, each has its mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:  # to set an attribute of a Module costs microseconds
                module.training = mode


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module of any class normalizes in evaluation as BatchNorm does."""
    # InstanceNorm averages variances within instances; TorchScript runs no hooks.
    if isinstance(module, (_InstanceNorm, torch.jit.ScriptModule)):
        return False
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return (
        isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and mean.dim() == 1
        and mean.shape == var.shape
        and mean.numel() > 0  # pruning may leave no channel
        and isinstance(getattr(module, "eps", None), (int, float))
    )


def is_about_zero(layer: nn.Module) -> bool:
    """Whether a layer keeps its statistics about zero, which any layer may say by a method."""
    says = getattr(layer, "statistics_about_zero", None)
    return says is not None and bool(says())


def check_center(name: str, layer: nn.Module, mean: Tensor) -> None:
    """Refuse statistics about a mean for a layer that keeps them about zero: it has no mean."""
    if is_about_zero(layer) and mean.any():
        raise LayerMismatchError(
            f"layer '{name}' ({type(layer).__name__}) keeps its statistics about zero: expected a "
            "mean of 0 and mean squares, got the mean and variance of another family's layer: "
            "measure them with this model"
        )


def num_features(layer: nn.Module) -> int:
    """Return the number of channels of a layer with running statistics."""
    # FrozenBatchNorm2d has no such attribute.
    return cast(Tensor, layer.running_mean).numel()


def no_batchnorm(model: nn.Module, include: Include | None) -> str:
    """Return a message about a model in which ``named_batchnorms`` found nothing."""
    message = f"{type(model).__name__} has no BatchNorm layer with running statistics"
    if include is not None and (there := named_batchnorms(model, lambda *_: True)):
        return f"{message} that include chooses, of {len(there)}: {first_names(there)}"
    found = Counter(kind for _, module in named_layers(model) if (kind := _instead(module)))
    if not found:
        return message
    kinds = "; ".join(f"{count} {kind}" for kind, count in found.items())
    return f"{message}; found instead: {kinds}"


def _instead(module: nn.Module) -> str | None:
    """Describe a module that a user may take for a BatchNorm with running statistics."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", name)
        if "BatchNorm" not in name:
            return None
        return f"{name} in TorchScript, which runs no hooks: measure before torch.jit.script"
    if isinstance(module, _BatchNorm):
        if isinstance(module.running_mean, Tensor) and not module.running_mean.numel():
            return f"{name} without channels"
        return f"{name} without running statistics (track_running_stats=False)"
    if keeps_statistics(module):
        return f"{name}, served where include(name, module) is True"
    return None


def first_names(names: Collection[object]) -> str:
    """Return the first few names, for a message."""
    shown = ", ".join(repr(name) for name in islice(names, 3))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_layer(name: str, module: nn.Module) -> None:
    """Refuse a lazy layer whose features are not known yet, and statistics that are parameters."""
    if isinstance(getattr(module, "running_mean", None), nn.Parameter):
        raise InvalidTypeError(
            f"layer '{name}' ({type(module).__name__}): expected running statistics that are "
            "buffers, got parameters: use register_buffer, as nn.BatchNorm does"
        )
    check_materialized(name, module)


def check_materialized(name: str, module: nn.Module) -> None:
    """Refuse a lazy layer whose features are not known yet."""
    unready = getattr(module, "has_uninitialized_params", None)
    if unready is not None and unready():
        raise InvalidTypeError(
            f"layer '{name}' ({type(module).__name__}) is lazy and not yet materialized: "
            "run one forward of the model first"
        )
