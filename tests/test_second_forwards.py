"""Second forwards in a training step: what people do about their statistics, and what it does."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
from cases import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "torch": nn.BatchNorm1d,
    **{f.name: f.layers[1] for f in FAMILIES},
    "moving_average": functools.partial(bnstats.MovingAverageBatchNorm1d, window=3, warmup=2),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def network(make):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), make(4), nn.ReLU(), nn.Linear(4, 4), make(4))
    for i in range(6):
        model(torch.randn(8, 3) + i).square().sum().backward()
    model.zero_grad()
    return model


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def momentum_zero(model):
    before = [layer.momentum for layer in batchnorms(model)]
    for layer in batchnorms(model):
        layer.momentum = 0.0
    yield model
    for layer, momentum in zip(batchnorms(model), before, strict=True):
        layer.momentum = momentum


@contextmanager
def not_tracking(model):
    for layer in batchnorms(model):
        layer.track_running_stats = False
    yield model
    for layer in batchnorms(model):
        layer.track_running_stats = True


@contextmanager
def evaluating(model):
    model.eval()
    yield model
    model.train()


@contextmanager
def buffers_put_back(model):
    before = [buffer.clone() for buffer in model.buffers()]
    yield model
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


@contextmanager
def on_a_copy(model):
    yield copy.deepcopy(model)


@contextmanager
def holding(model):
    with bnstats.hold_statistics(model):
        yield model


def outcome(make, way):
    """Whether buffers stay, bit for bit; output is training's; gradients reach the parameters."""
    model, x = network(make), torch.randn(8, 3) + 1
    training = copy.deepcopy(model)
    expected = training(x)
    expected.square().sum().backward()
    before = [buffer.clone() for buffer in model.buffers()]
    with way(model) as used:
        output = used(x)
    try:
        output.square().sum().backward()
        gradients = all(
            p.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-5)
            for p, q in zip(model.parameters(), training.parameters(), strict=True)
        )
    except RuntimeError as error:  # autograd keeps torch's buffers, which were written to
        if "modified by an inplace operation" not in str(error):
            raise
        gradients = False
    stay = all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    return stay, torch.allclose(output, expected, atol=1e-5), gradients


ALL = (True, True, True)
WAYS = {
    # For each way what becomes of nn.BatchNorm, and of each of our families.
    momentum_zero: {"torch": (False, True, True), "moving_average": ALL},
    not_tracking: {"torch": ALL, "moving_average": (True, False, False)},
    evaluating: dict.fromkeys(LAYERS, (True, False, False)),
    buffers_put_back: {"torch": (True, True, False), "moving_average": (False, True, True)},
    on_a_copy: dict.fromkeys(LAYERS, (True, True, False)),
    holding: {},
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_what_each_way_keeps(way, name):
    assert outcome(LAYERS[name], way) == WAYS[way].get(name, ALL)


def test_torchs_layers_with_momentum_zero_do_not_survive_a_batch_that_is_not_finite():
    layer = nn.BatchNorm1d(3, momentum=0.0)
    layer(torch.full((4, 3), torch.inf))
    assert layer.running_mean.isnan().all()


class Sharpness:
    """Sharpness-aware minimization: the gradient is that at the worst weights nearby."""

    def __init__(self, model, radius=0.5):
        self.model, self.radius = model, radius
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(self, x, second):
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        norm = torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()
        moves = [p.grad * self.radius / norm for p in self.model.parameters()]
        with torch.no_grad():
            for p, move in zip(self.model.parameters(), moves, strict=True):
                p.add_(move)
        self.optimizer.zero_grad()
        if second:
            with bnstats.hold_statistics(self.model):
                self.model(x).square().mean().backward()
        with torch.no_grad():
            for p, move in zip(self.model.parameters(), moves, strict=True):
                p.sub_(move)
        if second:
            self.optimizer.step()


@each_layer
def test_a_step_of_sharpness_aware_minimization_has_the_statistics_of_its_first_forward(make):
    model = network(make)
    for x in torch.randn(5, 8, 3):
        first_alone = copy.deepcopy(model)
        Sharpness(first_alone).step(x, second=False)
        Sharpness(model).step(x, second=True)
        for a, b in zip(model.buffers(), first_alone.buffers(), strict=True):
            assert torch.equal(a, b)


@each_layer
@pytest.mark.parametrize("autocast", [False, True])
def test_adversarial_inputs_are_found_without_a_trace(make, autocast):
    model, x = network(make), torch.randn(8, 3)
    before = [buffer.clone() for buffer in model.buffers()]
    attacked = x.clone()
    with bnstats.hold_statistics(model), torch.autocast("cpu", enabled=autocast):
        for _ in range(3):
            attacked.requires_grad_()
            (gradient,) = torch.autograd.grad(model(attacked).float().square().sum(), attacked)
            attacked = (attacked + 0.1 * gradient.sign()).detach()
    assert not torch.equal(attacked, x)
    for a, b in zip(model.buffers(), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_masked_forward_is_held_too(family):
    layer, x = family.make(1), torch.randn(4, 3, 6)
    valid = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    before = [buffer.clone() for buffer in layer.buffers()]
    expected = copy.deepcopy(layer)(x, mask=valid)
    with bnstats.hold_statistics(layer):
        assert torch.equal(layer(x, mask=valid), expected)
    for a, b in zip(layer.buffers(), before, strict=True):
        assert torch.equal(a, b)
