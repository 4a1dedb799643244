"""Forward-mode differentiation of a training step: nn.BatchNorm's, or an error with the remedy."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from bnstats.errors import InvalidValueError
from cases import FAMILIES, PLAIN, each_family, normalizing_as_torch

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1] * 5, [0] * 5]).bool()
each_mask = pytest.mark.parametrize("mask", [None, MASK], ids=["all values", "masked"])
each_way = pytest.mark.parametrize("way", ["torch.func.jvp", "forward_ad"])
each_argument = pytest.mark.parametrize("argument", ["input", "weight", "bias"])
differentiated_forward = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name != "moving_average"], ids=lambda f: f.name
)
# torch's own: forward mode loads decompositions that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is deprecated")


def make(layer):
    layer = layer.double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def tangent_of(layer, argument, x, mask, way):
    """The derivative of a training forward along a tangent of one argument; its state moves."""
    values = {"input": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    tangent = torch.arange(1.0, values[argument].numel() + 1).view_as(values[argument]).double()
    buffers = dict(layer.named_buffers())

    def forward(value, state):
        given = {**values, argument: value}
        x = given.pop("input")
        return functional_call(layer, {**given, **state}, (x,) if mask is None else (x, mask))

    if way == "forward_ad":
        with forward_ad.dual_level():
            output = forward(forward_ad.make_dual(values[argument], tangent), buffers)
            return forward_ad.unpack_dual(output)[:2]

    def function(value):  # which may write to nothing that it did not make
        return forward(value, {name: buffer.clone() for name, buffer in buffers.items()})

    return jvp(function, (values[argument],), (tangent,))


def by_reverse_mode(layer, argument, x, mask):
    """The same from the Jacobian of reverse mode."""
    values = {"input": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    tangent = torch.arange(1.0, values[argument].numel() + 1).view_as(values[argument]).double()

    def function(value):
        given = {**values, argument: value}
        x = given.pop("input")
        return functional_call(copy.deepcopy(layer), given, (x,) if mask is None else (x, mask))

    jacobian = torch.autograd.functional.jacobian(function, values[argument])
    return (jacobian.flatten(-tangent.dim()) @ tangent.flatten()).view_as(x)


def trained(family):
    layer = make(family.make(1))
    for scale in (1, 3, 5):
        layer(torch.randn(4, 3, 5).double() * scale)
    return layer


@normalizing_as_torch
@each_argument
@each_way
def test_tangents_are_those_of_torchs_layer(family, argument, way):
    layer, plain = make(family.make(1)), make(PLAIN[1](3))
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    x = torch.randn(4, 3, 5).double()
    found = tangent_of(layer, argument, x, None, way)
    torch.testing.assert_close(found, tangent_of(plain, argument, x, None, way))


@differentiated_forward
@each_mask
@each_argument
@each_way
def test_tangents_are_those_of_reverse_mode(family, mask, argument, way):
    layer, x = trained(family), torch.randn(4, 3, 5).double()
    expected = by_reverse_mode(layer, argument, x, mask)
    torch.testing.assert_close(tangent_of(layer, argument, x, mask, way)[1], expected)


@each_family
@each_argument
@each_way
def test_in_evaluation_every_family_takes_tangents(family, argument, way):
    layer, x = trained(family).eval(), torch.randn(4, 3, 5).double()
    expected = by_reverse_mode(layer, argument, x, None)
    torch.testing.assert_close(tangent_of(layer, argument, x, None, way)[1], expected)


@differentiated_forward
@each_mask
def test_a_forward_with_a_tangent_moves_the_statistics(family, mask):
    layer, x = trained(family), torch.randn(4, 3, 5).double()
    twin = copy.deepcopy(layer)
    tangent_of(layer, "input", x, mask, "forward_ad")
    twin(x) if mask is None else twin(x, mask)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_mask
@each_argument
@each_way
def test_moving_averages_refuse_a_tangent_and_move_nothing(mask, argument, way):
    (family,) = (f for f in FAMILIES if f.name == "moving_average")
    layer, x = trained(family), torch.randn(4, 3, 5).double()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        InvalidValueError, match=r"MovingAverageBatchNorm1d\(3\): forward-mode .* nn.BatchNorm"
    ):
        tangent_of(layer, argument, x, mask, way)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
