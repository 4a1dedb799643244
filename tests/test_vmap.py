"""Stacked ensembles: torch.vmap over layers in training is a loop over its members."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state

from cases import PLAIN, each_family

pytestmark = pytest.mark.usefixtures("one_thread")

MEMBERS = 3
SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 5}


def members(make):
    torch.manual_seed(3)
    nets = [nn.Sequential(nn.Linear(5, 4), make(), nn.Linear(4, 2)) for _ in range(MEMBERS)]
    for net in nets:
        nn.init.normal_(net[1].weight)
    return nets


def of(family):
    return lambda: family.make(1, 4, **(SHORT if family.name == "moving_average" else {}))


def batches(count=8):
    generator = torch.Generator().manual_seed(4)
    data = [torch.randn(MEMBERS, 6, 5, generator=generator) for _ in range(count)]
    if count > 4:
        data[4][1, 2, 3] = torch.nan  # one member skips a batch that others count
    return data


def assert_stacked(stacked, nets):
    for name, values in stacked.items():
        for value, net in zip(values, nets, strict=True):
            own = dict(net.named_buffers())[name]
            torch.testing.assert_close(value, own, msg=name, equal_nan=True)


@each_family
def test_a_forward_of_an_ensemble_is_that_of_its_members(family):
    nets = members(of(family))
    weights, buffers = stack_module_state(copy.deepcopy(nets))
    base = copy.deepcopy(nets[0])

    def forward(weights, buffers, x):
        return functional_call(base, (weights, buffers), (x,))

    for x in batches():
        output = torch.vmap(forward)(weights, buffers, x)
        expected = torch.stack([net(part) for net, part in zip(nets, x, strict=True)])
        torch.testing.assert_close(output, expected, equal_nan=True)
    assert_stacked(buffers, nets)


@each_family
def test_gradients_of_an_ensemble_are_those_of_its_members(family):
    nets = members(of(family))
    weights, buffers = stack_module_state(copy.deepcopy(nets))
    base = copy.deepcopy(nets[0])

    def loss(weights, buffers, x):
        return functional_call(base, (weights, buffers), (x,)).square().sum()

    for x in batches():
        gradients = torch.vmap(grad(loss))(weights, buffers, x)
        for index, (net, part) in enumerate(zip(nets, x, strict=True)):
            net.zero_grad()
            net(part).square().sum().backward()
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(
                    gradients[name][index], parameter.grad, msg=name, equal_nan=True
                )
    assert_stacked(buffers, nets)


# (dimensions, options of the layers, dtype, one input for all members, members at a time)
CASES = {
    "2d": (2, {}, torch.float32, False, None),
    "3d": (3, {}, torch.float32, False, None),
    "one input": (2, {}, torch.float32, True, None),
    "chunks": (2, {}, torch.float32, False, 2),
    "float64": (2, {}, torch.float64, False, None),
    "bfloat16": (2, {}, torch.bfloat16, False, None),
    "weight alone": (2, {"bias": False}, torch.float32, False, None),
    "per batch": (2, {"momentum": None}, torch.float32, False, None),
    "latest batch alone": (2, {"momentum": 1.0}, torch.float32, False, None),
    "nothing moves": (2, {"momentum": 0.0}, torch.float32, False, None),
}


@each_family
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("by", ["torch.func.grad", "backward"])
def test_whatever_the_options_an_ensemble_is_a_loop_over_its_members(family, case, by):
    dims, options, dtype, shared, chunk = case
    short = SHORT if family.name == "moving_average" else {}
    nets = [family.make(dims, **short, **options, dtype=dtype) for _ in range(MEMBERS)]
    for parameter in (p for net in nets for p in net.parameters()):
        nn.init.normal_(parameter)
    weights, buffers = stack_module_state(copy.deepcopy(nets))
    base, in_dims = copy.deepcopy(nets[0]), (0, 0, None if shared else 0)

    def loss(weights, buffers, x):
        return functional_call(base, (weights, buffers), (x,)).square().sum()

    for _ in range(7 if family.name == "moving_average" else 3):
        x = torch.randn(4, 3, *[3] * dims) if shared else torch.randn(MEMBERS, 4, 3, *[3] * dims)
        x = x.to(dtype)
        if by == "backward":
            losses = torch.vmap(loss, in_dims, chunk_size=chunk)(weights, buffers, x)
            found = torch.autograd.grad(losses.sum(), [*weights.values()])
            gradients = dict(zip(weights, found, strict=True))
        else:
            gradients = torch.vmap(grad(loss), in_dims, chunk_size=chunk)(weights, buffers, x)
        for index, net in enumerate(nets):
            net.zero_grad()
            net(x if shared else x[index]).square().sum().backward()
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(gradients[name][index], parameter.grad)
    assert_stacked(buffers, nets)


def test_torchs_own_layer_is_a_loop_over_its_members_too():
    # what is promised: wherever nn.BatchNorm works
    nets = members(lambda: PLAIN[1](4))
    weights, buffers = stack_module_state(copy.deepcopy(nets))

    def forward(weights, buffers, x):
        return functional_call(copy.deepcopy(nets[0]), (weights, buffers), (x,))

    for x in batches(3):
        output = torch.vmap(forward)(weights, buffers, x)
        for net, part, actual in zip(nets, x, output, strict=True):
            torch.testing.assert_close(actual, net(part))
    assert_stacked(buffers, nets)


@each_family
def test_a_transform_alone_moves_the_statistics_as_a_forward_does(family):
    layer = of(family)()
    twin, x = copy.deepcopy(layer), torch.randn(6, 4)

    def loss(weights, buffers, x):
        return functional_call(layer, (weights, buffers), (x,)).pow(2).sum()

    weights = {name: value.detach() for name, value in layer.named_parameters()}
    gradients = grad(loss)(weights, dict(layer.named_buffers()), x)
    twin(x).pow(2).sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))
