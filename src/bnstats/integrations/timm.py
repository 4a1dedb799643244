"""timm: layers that normalize and activate, for models that are built with them. Needs timm.

A model that timm has built is converted like any other, ``bnstats.convert_batchnorm(model,
"ema")``, and needs nothing from here. To build one with a family's layers:

- where timm takes a plain normalization (``resnet``), pass the class:
  ``timm.create_model("resnet18", norm_layer=bnstats.EMABatchNorm2d)``;
- where it takes one that activates too (``efficientnet`` and every other architecture with
  ``BatchNormAct2d``), pass :func:`norm_act_layer`. timm hands the activation of the architecture
  to its own classes alone: give it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bnstats.conversion.run import Target
from bnstats.errors import InvalidValueError

try:
    from bnstats.layers.batch_norm_act import (
        FAMILIES,
        CumulativeBatchNormAct2d,
        EMABatchNormAct2d,
        MovingAverageBatchNormAct2d,
        RenormBatchNormAct2d,
        activated,
    )
except ImportError as error:
    raise ImportError("bnstats.integrations.timm needs timm: pip install timm") from error

__all__ = [
    "CumulativeBatchNormAct2d",
    "EMABatchNormAct2d",
    "MovingAverageBatchNormAct2d",
    "RenormBatchNormAct2d",
    "norm_act_layer",
]


def norm_act_layer(to: Target, **options: Any) -> Callable[..., nn.Module]:
    """Return a function that ``timm.create_model`` takes as its ``norm_layer``.

    Args:
        to: ``"ema"``, ``"cumulative"``, ``"moving_average"`` or ``"renorm"``.
        **options: of the family's class; ``act_layer``, the activation (by default ReLU),
            ``act_kwargs``, ``inplace``.

    Raises:
        InvalidValueError: an unknown family.

    Example:
        >>> import timm
        >>> from torch import nn
        >>> from bnstats.integrations.timm import norm_act_layer
        >>> norm_layer = norm_act_layer("ema", act_layer=nn.SiLU)
        >>> model = timm.create_model("test_efficientnet", norm_layer=norm_layer)
        >>> type(model.bn1).__name__
        'EMABatchNormAct2d'
    """
    family: str = to  # a caller's may be any
    cls = None if family == "plain" else activated(family)
    if cls is None:
        expected = ", ".join(known for known in FAMILIES if known != "plain")
        raise InvalidValueError(f"to: expected one of {expected}, got {to!r}")

    # A function, not a class or a partial: timm looks up what classes stand for by their names.
    def make(num_features: int, **arguments: Any) -> nn.Module:
        return cls(num_features, **{**arguments, **options})

    return make
