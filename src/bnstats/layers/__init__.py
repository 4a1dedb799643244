"""The drop-in layers: each ``...Nd`` class is also an instance of torch's ``nn.BatchNormNd``."""

from bnstats.layers.cumulative import (
    CumulativeBatchNorm,
    CumulativeBatchNorm1d,
    CumulativeBatchNorm2d,
    CumulativeBatchNorm3d,
)
from bnstats.layers.ema import EMABatchNorm, EMABatchNorm1d, EMABatchNorm2d, EMABatchNorm3d

__all__ = [
    "CumulativeBatchNorm",
    "CumulativeBatchNorm1d",
    "CumulativeBatchNorm2d",
    "CumulativeBatchNorm3d",
    "EMABatchNorm",
    "EMABatchNorm1d",
    "EMABatchNorm2d",
    "EMABatchNorm3d",
]
