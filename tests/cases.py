"""The layer families: a new layer is one row here, and every promise is tested on it."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import bnstats

SHAPES = {
    "1d, N C": (1, (8, 3)),
    "1d, N C L": (1, (4, 3, 7)),
    "2d": (2, (4, 3, 5, 6)),
    "3d": (3, (2, 3, 4, 5, 6)),
}

PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def built(cls, num_features, **options):
    """A layer; a momentum of 1 is set once it is there, as fvcore does: passed, it is warned of."""
    latest_alone = options.get("momentum") == 1
    if latest_alone:
        del options["momentum"]
    layer = cls(num_features, **options)
    if latest_alone:
        layer.momentum = 1.0
    return layer


@dataclass(frozen=True)
class Family:
    """A family of layers: one class for each number of spatial dimensions, and the base."""

    name: str
    base: type
    layers: dict
    batch_statistics: bool = True  # training normalizes as nn.BatchNorm does
    options: dict = field(default_factory=dict)

    def make(self, dims, num_features=3, **options):
        return built(self.layers[dims], num_features, **{**self.options, **options})


def family(name, prefix, **kwargs):
    layers = {n: getattr(bnstats, f"{prefix}{n}d") for n in (1, 2, 3)}
    return Family(name, getattr(bnstats, prefix), layers, **kwargs)


FAMILIES = [
    family("ema", "EMABatchNorm"),
    family("cumulative", "CumulativeBatchNorm"),
    family("moving_average", "MovingAverageBatchNorm", batch_statistics=False),
    family("renorm", "RenormBatchNorm", batch_statistics=False, options={"warmup": 1, "ramp": 2}),
]


def batches(shape, count=5, scale=2.0, shift=0.5, dtype=torch.float32):
    """Batches that differ in mean and scale, so that pooling them is not averaging them."""
    return [
        (torch.randn(shape) * (1 + scale * i / count) + shift * i).to(dtype) for i in range(count)
    ]


each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
normalizing_as_torch = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.batch_statistics], ids=lambda f: f.name
)


def state(layer):
    """A copy of what a layer would save."""
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_state(layer, expected):
    """The layer would save these very bits."""
    for key, value in layer.state_dict().items():
        assert torch.equal(value, expected[key]), key
