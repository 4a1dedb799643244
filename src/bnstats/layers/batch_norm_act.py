"""The families as timm's layers that normalize, drop out and activate. Needs timm.

timm's ``BatchNormAct2d`` is a BatchNorm with the activation in its forward, and every second
architecture of timm is built of it. Each class here is an instance of timm's, so that what timm
does with its own layers (freezing, synchronizing, pruning) it does with these.
"""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from bnstats.layers.cumulative import CumulativeBatchNorm2d
from bnstats.layers.ema import EMABatchNorm2d
from bnstats.layers.moving_average import MovingAverageBatchNorm2d
from bnstats.layers.renorm import RenormBatchNorm2d


class Activated(nn.Module):
    """Drops out and activates what a family's layer has normalized.

    Args:
        num_features: C, the number of channels.
        *args: of the family's class.
        apply_act: False leaves the activation out.
        act_layer: the activation, by class or by timm's name of it.
        act_kwargs: its arguments.
        inplace: let it overwrite its input, where it can.
        drop_layer: class of a layer between normalization and activation.
        **options: of the family's class.
    """

    _family: ClassVar[type[nn.Module]]

    drop: nn.Module
    act: nn.Module

    def __init__(
        self,
        num_features: int,
        *args: Any,
        apply_act: bool = True,
        act_layer: Any = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: type[nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self._family.__init__(self, num_features, *args, **options)
        # timm knows how to make an activation of a name, a class or a function.
        made = BatchNormAct2d(
            num_features=1,
            apply_act=apply_act,
            act_layer=act_layer,
            act_kwargs=act_kwargs or {},
            inplace=inplace,
            drop_layer=drop_layer,
        )
        self.drop, self.act = made.drop, made.act

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize, drop out, activate."""
        normalized = self._family.forward(self, *args, **kwargs)
        output: Tensor = self.act(self.drop(normalized))
        return output

    @classmethod
    def __bnstats_class__(cls, to: str) -> type[nn.Module] | None:
        return activated(to)


class EMABatchNormAct2d(Activated, BatchNormAct2d, EMABatchNorm2d):
    """:class:`bnstats.EMABatchNorm2d` with an activation; also timm's ``BatchNormAct2d``."""

    _family = EMABatchNorm2d


class CumulativeBatchNormAct2d(Activated, BatchNormAct2d, CumulativeBatchNorm2d):
    """:class:`bnstats.CumulativeBatchNorm2d` with an activation; also timm's ``BatchNormAct2d``."""

    _family = CumulativeBatchNorm2d


class MovingAverageBatchNormAct2d(Activated, BatchNormAct2d, MovingAverageBatchNorm2d):
    """:class:`bnstats.MovingAverageBatchNorm2d` with an activation; a ``BatchNormAct2d`` too."""

    _family = MovingAverageBatchNorm2d


class RenormBatchNormAct2d(Activated, BatchNormAct2d, RenormBatchNorm2d):
    """:class:`bnstats.RenormBatchNorm2d` with an activation; also timm's ``BatchNormAct2d``."""

    _family = RenormBatchNorm2d


FAMILIES: dict[str, type[nn.Module]] = {
    "plain": BatchNormAct2d,
    "ema": EMABatchNormAct2d,
    "cumulative": CumulativeBatchNormAct2d,
    "moving_average": MovingAverageBatchNormAct2d,
    "renorm": RenormBatchNormAct2d,
}


def activated(to: str) -> type[nn.Module] | None:
    """Return what timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` become in a family."""
    return FAMILIES.get(to)
