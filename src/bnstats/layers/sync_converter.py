"""Noticing that torch's converter makes plain synchronized layers of this package's."""

from __future__ import annotations

import sys
from typing import NoReturn

from torch import nn

from bnstats.errors import warn


class Unset:
    """A missing attribute that warns when torch's converter reads it.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces every BatchNorm, of any class, by a new
    layer, as do timm's function of that name and trainers that call it (Lightning's
    ``Trainer(sync_batchnorm=True)``). They offer no hook, but they read each layer's ``qconfig`` to
    copy it. A layer that was given one by quantization has it as usual.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: nn.Module | None, owner: type | None = None) -> NoReturn:
        if layer is not None and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            name = type(layer).__name__
            warn(
                f"convert_sync_batchnorm puts a plain SyncBatchNorm in the place of {name}, and "
                "leaves centered layers as they are: call it first, and "
                "bnstats.convert_batchnorm on the model that it returns; or leave it out, and pass "
                "sync=True to bnstats.convert_batchnorm"
            )
        raise AttributeError(f"{owner} has no attribute {self._name!r}")
