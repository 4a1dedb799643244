"""Checks of what a layer is given: of its options, and of an input's dtype."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.layers.tracking import HALF


def check_integer(name: str, argument: str, value: Any, least: int) -> None:
    """Refuse an argument that is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name}: {argument}: expected an int, got {type(value).__name__}")
    if value < least:
        raise InvalidValueError(f"{name}: {argument}: expected {least} or more, got {value}")


def check_number(name: str, argument: str, value: Any) -> None:
    """Refuse an argument that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name}: {argument}: expected a number, got {type(value).__name__}")


def check_limit(name: str, argument: str, value: Any, least: float) -> None:
    """Refuse an argument that is not a finite number of at least ``least``."""
    check_number(name, argument, value)
    if not least <= value < math.inf:
        raise InvalidValueError(
            f"{name}: {argument}: expected a finite number of {least} or more, got {value}"
        )


def check_eps(name: str, eps: float) -> None:
    """Refuse an eps that leaves a constant channel's variance 0."""
    check_number(name, "eps", eps)
    if not 0 < eps < math.inf:
        raise InvalidValueError(f"{name}: eps: expected a positive number, got {eps}")


def check_momentum(name: str, momentum: float | None) -> None:
    """Refuse a momentum that is no weight."""
    if momentum is None:
        return
    check_number(name, "momentum", momentum)
    if not 0 <= momentum <= 1:
        raise InvalidValueError(
            f"{name}: momentum: expected a number in [0, 1], the weight of the new batch "
            f"(PyTorch's convention), got {momentum}"
        )


def check_dtype(layer: _BatchNorm, x: Tensor, wide: torch.dtype) -> None:
    """Refuse an input that torch does not normalize with statistics of the wide dtype."""
    fitting = (wide, *HALF) if wide == torch.float32 else (wide,)
    if not x.is_floating_point() or x.dtype not in fitting:
        raise InvalidTypeError(
            f"{type(layer).__name__}({layer.num_features}): expected an input of "
            f"{' or '.join(map(str, fitting))}, got {x.dtype}"
        )
