"""What the tests of MovingAverageBatchNorm share."""

import torch

import bnstats
from cases import built

LAYERS = {n: getattr(bnstats, f"MovingAverageBatchNorm{n}d") for n in (1, 2, 3)}

# Crosses the filled window (4), the warm-up (12) and the renormalization (25) early on.
SHORT = {"window": 4, "warmup": 12, "renorm_warmup": 25, "momentum": 0.1, "max_ratio": 1.2}
ORACLE_OPTIONS = {"eps": 1e-5, **SHORT}


def make(dims=2, channels=3, **options):
    return built(LAYERS[dims], channels, **{**SHORT, **options})


def state(layer):
    """Every buffer but the one that serves within a step."""
    return {k: v.clone() for k, v in layer.state_dict().items() if k not in ("weight", "bias")}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def train(layer, steps, shape=(2, 3, 4, 5), **options):
    for _ in range(steps):
        layer(torch.randn(shape, requires_grad=True, **options)).square().sum().backward()
    return layer
