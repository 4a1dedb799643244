"""What records or counts the operators of a training forward gets the layer's own results."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cases import each_family

TRACERS = {
    "make_fx": lambda layer, x: make_fx(lambda y: layer(y))(x),
    "torch.jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
}


# torch.jit's own: it is deprecated, and says that shapes are constants in what it traces
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@each_family
@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS.keys())
def test_a_traced_forward_goes_on_as_the_layer_does(family, tracer):
    short = {"window": 2, "warmup": 0, "renorm_warmup": 3}
    layer = family.make(1, **(short if family.name == "moving_average" else {}))
    traced_layer = copy.deepcopy(layer)
    first, *others = torch.randn(6, 4, 3, 5) * torch.arange(1.0, 7.0).view(-1, 1, 1, 1)
    layer(first)
    traced = tracer(traced_layer, first)
    for x in others:
        torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(traced_layer.state_dict(), layer.state_dict())


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1] * 5, [0] * 5]).bool()


@each_family
@pytest.mark.parametrize("given", [(), (MASK,)], ids=["all values", "masked"])
def test_a_traced_forward_is_differentiated_as_the_layer_is(family, given):
    # make_fx of torch 2.14 keeps no detach: buffers were given gradients.
    short = {"window": 2, "warmup": 0, "renorm_warmup": 3}
    options = short if family.name == "moving_average" else {}
    layer = family.make(1, **options, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    xs = torch.randn(6, 4, 3, 5, dtype=torch.float64) * torch.arange(1.0, 7.0).view(-1, 1, 1, 1)
    twin(xs[0], *given)
    traced = make_fx(lambda x: layer(x, *given))(xs[0])
    for x in xs[1:]:
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        traced(mine).pow(3).sum().backward()
        twin(theirs, *given).pow(3).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_family
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_forward_traced_without_values_goes_on_as_the_layer_does(family, mode):
    layer = family.make(2)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 3, 5, 5)
    traced = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())  # there were no values
    for size in (4, 4, 4) if mode == "fake" else (4, 2, 7):
        x = torch.randn(size, 3, 5, 5)
        torch.testing.assert_close(traced(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_family
def test_a_traced_training_step_goes_on_as_the_layers_does(family):
    short = {"window": 2, "warmup": 0, "renorm_warmup": 3}
    layer = family.make(2, **(short if family.name == "moving_average" else {}))
    twin, xs = copy.deepcopy(layer), torch.randn(6, 4, 3, 5, 5)
    weights, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(weights, buffers, x):
        return functional_call(layer, (weights, buffers), (x,)).square().sum()

    step = make_fx(grad(loss))(weights, buffers, xs[0])
    twin(xs[0]).square().sum().backward()
    for x in xs[1:]:
        gradients = step(weights, buffers, x)
        twin.zero_grad()
        twin(x).square().sum().backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_family
def test_a_mode_that_counts_the_forward_alone_changes_nothing(family):
    layer = nn.Sequential(nn.Linear(5, 5), family.make(1))
    counted = copy.deepcopy(layer)
    for x in torch.randn(5, 4, 3, 5):
        with FlopCounterMode(display=False):
            output = checkpoint(counted, x, use_reentrant=False)
        output.square().sum().backward()
        layer(x).square().sum().backward()
    torch.testing.assert_close(counted.state_dict(), layer.state_dict())
    for mine, plain in zip(counted.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)
