"""Which classes become each other, and what the class of a given layer becomes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnstats.errors import InvalidTypeError
from bnstats.layers import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    CenteredLinear,
    CumulativeBatchNorm,
    CumulativeBatchNorm1d,
    CumulativeBatchNorm2d,
    CumulativeBatchNorm3d,
    EMABatchNorm,
    EMABatchNorm1d,
    EMABatchNorm2d,
    EMABatchNorm3d,
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
    RenormBatchNorm,
    RenormBatchNorm1d,
    RenormBatchNorm2d,
    RenormBatchNorm3d,
)
from bnstats.layers.centered import CenteredForward, centered_subclass

PLAIN = "plain"

CENTERED = "moving_average"
"""The family that also has layers to stand before its batch norms."""

FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    # Classes of one column become each other. SyncBatchNorm takes any dimension, as a family's
    # base class does.
    PLAIN: (
        *(nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    ),
    "ema": (EMABatchNorm, EMABatchNorm1d, EMABatchNorm2d, EMABatchNorm3d),
    "cumulative": (
        CumulativeBatchNorm,
        CumulativeBatchNorm1d,
        CumulativeBatchNorm2d,
        CumulativeBatchNorm3d,
    ),
    "renorm": (RenormBatchNorm, RenormBatchNorm1d, RenormBatchNorm2d, RenormBatchNorm3d),
    CENTERED: (
        MovingAverageBatchNorm,
        MovingAverageBatchNorm1d,
        MovingAverageBatchNorm2d,
        MovingAverageBatchNorm3d,
        *(CenteredConv1d, CenteredConv2d, CenteredConv3d, CenteredLinear),
    ),
}

_COLUMNS = {known: column for row in FAMILIES.values() for column, known in enumerate(row)}
_FAMILY_OF = {known: family for family, row in FAMILIES.items() for known in row}

# Layers of other packages that normalize and more, by package and class, and the module of what
# they become. It is imported when one of them is there, and its package with it.
_ADAPTERS = {
    ("timm", "BatchNormAct2d"): "bnstats.layers.batch_norm_act",
    ("timm", "SyncBatchNormAct"): "bnstats.layers.batch_norm_act",
}

_CAME_FROM = "plain_class"
"""The attribute in which a converted layer keeps its plain class, for the way back."""

# Attributes of a class that do not change its behavior.
_INERT = {
    *("__init__", "__init_subclass__", "__annotate__", "__annotate_func__", "__bnstats_class__"),
    *("__doc__", "__dict__", "__weakref__", "__repr__", "extra_repr"),
}


def known_class(cls: type) -> type[nn.Module] | None:
    """Return the nearest class of the families that a class is or derives from."""
    return next((base for base in cls.__mro__ if base in _FAMILY_OF), None)


def family_of(module: nn.Module) -> str | None:
    """Return the family that a layer is of; None for other modules."""
    known = known_class(type(module))
    return None if known is None else _FAMILY_OF[known]


def written_class(module: nn.Module) -> type[nn.Module]:
    """Return a layer's class without the one that torch derives for its parametrizations."""
    cls = type(module)
    return cls.__bases__[0] if is_parametrized(module) else cls


def with_parametrizations(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """Derive from a class as torch does, where the layer that becomes it is parametrized.

    Not by changing the derived class's base: copies of a parametrized layer share the class.
    """
    if not is_parametrized(module):
        return cls
    return type(f"Parametrized{cls.__name__}", (cls,), dict(vars(type(module))))


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a layer, and keep a plain subclass that it had for the way back."""
    before = written_class(module)
    remembered = vars(module).pop(_CAME_FROM, None)
    if known_class(before) is not before and family_of(module) == PLAIN:
        remembered = before
    module.__class__ = with_parametrizations(cls, module)
    if remembered is not None and family_of(module) != PLAIN:
        vars(module)[_CAME_FROM] = remembered


def target_class(where: str, module: nn.Module, to: str) -> type[nn.Module]:
    """Return what the class of a layer becomes in the family ``to``.

    Raises:
        InvalidTypeError: its methods would be lost; ``where`` begins the message.
    """
    cls = written_class(module)
    if issubclass(cls, CenteredForward):
        return cls if to == CENTERED else cls.plain_class
    known = known_class(cls)
    if known is not None and _FAMILY_OF[known] == to:
        return cls
    remembered: type[nn.Module] | None = vars(module).get(_CAME_FROM)
    if to == PLAIN and remembered is not None:
        return _check_layout(where, cls, remembered)
    said = _said_class(where, cls, to)
    if said is not None:
        return _check_layout(where, cls, said)
    methods = _overridden_methods(known, module)
    to_center = to == CENTERED and not isinstance(module, _BatchNorm)
    if to_center and methods and not _computes_weight(methods, module):
        return _check_layout(where, cls, centered_subclass(cls))
    if known is None or methods:
        own = f"its own {', '.join(methods)}" if methods else "no known base"
        raise InvalidTypeError(
            f"{where}: expected a class of torch's or of bnstats, got a subclass with {own}: "
            f"leave it out with include{', center nothing with center=False' * to_center}, or let "
            f"its class declare what it becomes for {to!r} by a method __bnstats_class__ (see "
            "convert_batchnorm)"
        )
    return _check_layout(where, cls, FAMILIES[to][_COLUMNS[known]])


def _computes_weight(methods: list[str], module: nn.Module) -> bool:
    """Whether centering in a derived class's forward would miss what the layer computes with."""
    return "weight" in methods or "forward" in vars(module)


def _check_layout(where: str, cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    """Return the target if Python lets an object of the one class become one of the other."""
    try:
        object.__setattr__(object.__new__(cls), "__class__", target)
    except TypeError as error:
        raise InvalidTypeError(
            f"{where}: expected a class whose objects can become {target.__name__}s, as those "
            f"with __slots__ and those that derive from Generic before torch's layer cannot: "
            f"{error}; leave it out with include, or change the class"
        ) from None
    return target


def _said_class(where: str, cls: type[nn.Module], to: str) -> type[nn.Module] | None:
    """Return what the class of a layer, or the adapter for its package, declares it becomes."""
    says = getattr(cls, "__bnstats_class__", None) or _adapter(cls)
    said: type[nn.Module] | None = None if says is None else says(to)
    if said is None:
        return None
    known = known_class(said) if isinstance(said, type) else None
    if known is None or _FAMILY_OF[known] != to:
        names = ", ".join(base.__name__ for base in FAMILIES[to])
        raise InvalidTypeError(
            f"{where}: __bnstats_class__({to!r}): expected None or a class that derives from "
            f"one of {names}, got {said!r}"
        )
    return said


def _adapter(cls: type[nn.Module]) -> Callable[[str], type[nn.Module] | None] | None:
    module = _ADAPTERS.get((cls.__module__.partition(".")[0], cls.__name__))
    if module is None:
        return None
    activated: Callable[[str], type[nn.Module] | None] = import_module(module).activated
    return activated


def _overridden_methods(known: type[nn.Module] | None, module: nn.Module) -> list[str]:
    """Return the methods of a known class that a layer's own class replaces.

    ``forward`` is one, ``_conv_forward``, the methods behind state dicts, ``train``, a property
    ``weight``: without them the layer would compute or save something else. A method under a
    new name, for example a helper of the constructor, is not called by torch's methods.
    """
    names = ["forward"] if "forward" in vars(module) else []
    # A property may also stand for a parameter, a buffer or an option that an instance has.
    declared = frozenset() if known is None else _annotated(known)  # type: ignore[arg-type]
    state = {*module._parameters, *module._buffers, *declared}
    for base in written_class(module).__mro__:
        if base is known or known is None:
            break
        for name, value in vars(base).items():
            behaves = callable(value) or hasattr(value, "__get__")
            replaces = behaves and (hasattr(known, name) or name in state)
            if replaces and name not in _INERT and name not in names:
                names.append(name)
    return names


@cache  # asked for each layer of a model; and the classes that are known are few
def _annotated(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the attributes that a class and its bases declare."""
    return frozenset(name for base in cls.__mro__ for name in inspect.get_annotations(base))
