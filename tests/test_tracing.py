"""What looks on at the operators of a training forward sees them all, and no batch's numbers."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bnstats import MovingAverageBatchNorm1d
from cases import each_family

TRACERS = {
    "make_fx": lambda layer, x: make_fx(lambda y: layer(y))(x),
    "torch.jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
}


# torch.jit's own: it is deprecated, and says that shapes are constants in what it traces
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS.keys())
def test_a_traced_forward_of_moving_averages_goes_on_as_the_layer_does(tracer):
    layer = MovingAverageBatchNorm1d(3, window=2, warmup=0, renorm_warmup=3)
    traced_layer = copy.deepcopy(layer)
    first, *others = torch.randn(6, 4, 3, 5) * torch.arange(1.0, 7.0).view(-1, 1, 1, 1)
    layer(first)
    traced = tracer(traced_layer, first)
    for x in others:
        torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(traced_layer.state_dict(), layer.state_dict())


@each_family
def test_a_mode_that_looks_on_changes_nothing(family):
    layer = family.make(1)
    watched_layer = copy.deepcopy(layer)
    for x in torch.randn(5, 4, 3, 5):
        with FlopCounterMode(display=False):
            output = watched_layer(x)
        torch.testing.assert_close(output, layer(x))
    torch.testing.assert_close(watched_layer.state_dict(), layer.state_dict())
