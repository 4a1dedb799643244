"""The drop-in layers: each ``...Nd`` class is also an instance of torch's ``nn.BatchNormNd``."""

from bnstats.layers.centered import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    CenteredLinear,
)
from bnstats.layers.cumulative import (
    CumulativeBatchNorm,
    CumulativeBatchNorm1d,
    CumulativeBatchNorm2d,
    CumulativeBatchNorm3d,
)
from bnstats.layers.ema import EMABatchNorm, EMABatchNorm1d, EMABatchNorm2d, EMABatchNorm3d
from bnstats.layers.masked import masked
from bnstats.layers.moving_average import (
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)

__all__ = [
    "CenteredConv1d",
    "CenteredConv2d",
    "CenteredConv3d",
    "CenteredLinear",
    "CumulativeBatchNorm",
    "CumulativeBatchNorm1d",
    "CumulativeBatchNorm2d",
    "CumulativeBatchNorm3d",
    "EMABatchNorm",
    "EMABatchNorm1d",
    "EMABatchNorm2d",
    "EMABatchNorm3d",
    "MovingAverageBatchNorm",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "masked",
]
