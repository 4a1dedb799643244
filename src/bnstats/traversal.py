"""Finding BatchNorm layers in a model, by the names that its user knows them by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn, TypeAlias, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bnstats.errors import InvalidTypeError, UnknownLayerError

T = TypeVar("T")

Include: TypeAlias = Callable[[str, nn.Module], bool]
"""Chooses layers by name and module."""


class ByLayer(dict[str, T]):
    """A dict by layer name, which answers a name that is not there with the nearest."""

    def __missing__(self, name: str) -> NoReturn:
        raise UnknownLayerError(name, self)


def inner_key(module: nn.Module) -> str | None:
    """Return under which key a wrapper keeps the model that it wraps; None for other modules."""
    if isinstance(module, (DistributedDataParallel, DataParallel, AveragedModel)):
        return "module"
    # What torch.compile returns; importing its class would import the whole compiler.
    return "_orig_mod" if "_orig_mod" in module._modules else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel, torch.compile and the like."""
    check_module(model)
    while (key := inner_key(model)) is not None:
        model = model.get_submodule(key)
    return model


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` for every module, each once, in the order of ``named_modules``.

    The name is that of the unwrapped model: a wrapper's key is no part of it. The root's is "",
    and a module that stands in several places has the first one's.
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
    """Return the chosen BatchNorm layers with running statistics, each under its first name.

    Raises:
        InvalidTypeError: model is not a Module, or a layer is lazy and not yet materialized.
    """
    layers: dict[str, _BatchNorm] = {}
    for name, module in named_layers(model):
        if not isinstance(module, _BatchNorm):
            continue
        check_materialized(name, module)
        tracks = module.running_mean is not None and module.running_var is not None
        if tracks and (include is None or include(name, module)):
            layers[name] = module
    return layers


def check_materialized(name: str, module: nn.Module) -> None:
    """Refuse a lazy layer whose number of features is not known yet."""
    unready = getattr(module, "has_uninitialized_params", None)
    if unready is not None and unready():
        raise InvalidTypeError(
            f"layer '{name}' ({type(module).__name__}) is lazy and not yet materialized: "
            "run one forward of the model first"
        )


def check_module(model: object) -> None:
    """Refuse what is not a Module."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
