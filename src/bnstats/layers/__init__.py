"""The drop-in layers: each ``...Nd`` class is also an instance of torch's ``nn.BatchNormNd``."""

from inspect import cleandoc

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
from bnstats.layers.renorm import (
    RenormBatchNorm,
    RenormBatchNorm1d,
    RenormBatchNorm2d,
    RenormBatchNorm3d,
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
    "RenormBatchNorm",
    "RenormBatchNorm1d",
    "RenormBatchNorm2d",
    "RenormBatchNorm3d",
    "masked",
]


def _document_options() -> None:
    """Add the options of a family's class to the docstrings of those of 1, 2 and 3 dimensions.

    So ``EMABatchNorm2d?`` shows them, and they are written in one place.
    """
    for name in __all__:
        cls = globals()[name]
        if not isinstance(cls, type) or not name.endswith("d"):
            continue
        family = cls.__bases__[0]
        if family.__name__ not in __all__ or not family.__doc__:
            continue  # python -OO leaves no docstrings
        # Python 3.13 takes the indentation out of docstrings, earlier ones do not.
        _, begin, rest = cleandoc(family.__doc__).partition("Args:\n")
        options, _, _ = rest.partition("\n\n")
        summary, _, example = cleandoc(cls.__doc__ or "").partition("\n\n")
        cls.__doc__ = "\n\n".join(filter(None, [summary, begin + options, example]))


_document_options()
