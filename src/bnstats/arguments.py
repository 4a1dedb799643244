"""Checks of what callers pass: what was expected, what came, and what was probably meant."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.errors import InvalidTypeError, InvalidValueError, warn


def check_module(model: object, other: object = None, order: str = "") -> None:
    """Refuse what is not a Module.

    Args:
        model: what came as the model.
        other: the next argument; if that one is a Module, the two were swapped.
        order: the two arguments' names.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(other, nn.Module):
        came = f"{type(model).__name__}: the arguments are swapped, pass ({order})"
    else:
        came = _what_came(model)
    raise InvalidTypeError(f"model: expected a torch.nn.Module, got {came}")


def _what_came(model: object) -> str:
    """Return the type of what is no Module, and how to make one of it."""
    name = type(model).__name__
    if isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values()):
        return f"{name}, a state dict: load it into a model, model.load_state_dict(...), first"
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"the class {model.__name__}: pass a model, {model.__name__}(...)"
    if isinstance(model, (str, os.PathLike)):
        return f"{name}, a path: build the model and load the checkpoint into it first"
    if inspect.isroutine(model):
        return f"{name} {model.__name__}: call it, if it makes the model"
    return name


def check_has_values(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose running statistics are on the meta device, where nothing can be kept.

    Parameters may be there: accelerate's offloading brings them for each forward.
    """
    for name, layer in layers.items():
        if any(buffer.is_meta for buffer in layer.buffers(recurse=False)):
            raise InvalidValueError(
                f"layer '{name}' ({type(layer).__name__}): expected running statistics with "
                "values, got tensors on the meta device: model.to_empty(device=...), then "
                "model.load_state_dict(...)"
            )


def check_writable(name: str, layer: nn.Module, tensors: Iterable[Tensor | None]) -> None:
    """Refuse tensors of a layer that were made in inference mode, outside of it."""
    made_there = any(x is not None and x.is_inference() for x in tensors)
    if made_there and not torch.is_inference_mode_enabled():
        raise InvalidValueError(
            f"layer '{name}' ({type(layer).__name__}): expected tensors that can be written to, "
            "got some that were made in torch.inference_mode() and can be written to only there: "
            "make, or load, the model outside of it, or call this in it"
        )


def check_function(argument: str, function: object, signature: str) -> None:
    """Refuse what cannot be called with the arguments that it will get.

    Args:
        argument: its name.
        function: what came; None is allowed.
        signature: the parameters, for example ``"name, module"``.
    """
    if function is None:
        return
    expected = f"{argument}: expected a function {argument}({signature}) or None, got"
    if isinstance(function, type) and issubclass(function, nn.Module):
        name, instead = function.__name__, ""
        if signature == "name, module":
            instead = f"; for a type use lambda name, module: isinstance(module, {name})"
        raise InvalidTypeError(f"{expected} the class {name}{instead}")
    if not callable(function):
        instead = _instead_of_names(function) if "name" in signature else ""
        raise InvalidTypeError(f"{expected} {type(function).__name__}{instead}")
    if mismatch := mismatch_of(function, signature.split(", ")):
        name, instead = getattr(function, "__name__", type(function).__name__), ""
        if argument == "forward" and isinstance(function, nn.Module):
            instead = ": leave it out, or pass lambda model, batch: model(batch)"
        raise InvalidTypeError(f"{expected} {name}{mismatch}{instead}")


def mismatch_of(function: Callable[..., Any], arguments: Iterable[str]) -> str:
    """Return a function's signature and why it does not take these arguments; else nothing."""
    try:
        # (A Module's own signature takes anything.)
        called = function.forward if isinstance(function, nn.Module) else function
        known = inspect.signature(called)
    except (TypeError, ValueError):  # a builtin's may not be known
        return ""
    try:
        known.bind(*arguments)
    except TypeError as error:
        return f"{known}: {error}"
    return ""


def _instead_of_names(names: object) -> str:
    """Return what to pass in the place of layers' names."""
    if isinstance(names, str):
        return f"; for names use lambda name, module: name.startswith({names!r})"
    if isinstance(names, (list, tuple, set, frozenset)) and all(isinstance(x, str) for x in names):
        prefixes = tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)
        return f"; for names use lambda name, module: name.startswith({prefixes!r})"
    return ""


def warn_of_momentum(name: str, momentum: float | None) -> None:
    """Warn of a momentum that looks like the weight of the old average.

    Tools that use momentum 1 on purpose (fvcore's precise batch norm) set the attribute of layers
    that exist; a user who builds a layer with it may expect statistics that never move.
    """
    if momentum is None or momentum <= 0.5:
        return
    if momentum == 1:
        meaning = (
            "keeps the statistics of the latest batch alone, as in PyTorch; momentum=0 leaves them "
            "as they are, and momentum=None averages all batches"
        )
        warn(f"{name}: momentum=1 {meaning}. To use it on purpose, set layer.momentum = 1.0")
        return
    new, old = f"{momentum:.4g}", f"{1 - momentum:.4g}"
    warn(
        f"{name}: momentum={new} weighs the new batch by {new} and the running statistics by "
        f"{old}, as in PyTorch; in Keras and Flax momentum is the weight of the running "
        f"statistics: {new} there is {old} here"
    )


def describe_channels_last(shape: tuple[int, ...], num_channels: int | None = None) -> str:
    """Return a hint where an array may have its channels in the last axis; else nothing.

    Args:
        shape: of the array.
        num_channels: what is expected; where it is not known, an image's 1, 3 or 4.
    """
    if len(shape) < 3 or shape[1] == shape[-1]:
        return ""
    channels = (1, 3, 4) if num_channels is None else (num_channels,)
    if shape[-1] not in channels or shape[1] in channels:
        return ""
    return "; if the channels are in the last axis, pass x.movedim(-1, 1)"
