"""torch.fx and TorchScript, which read a model's code: what they make of converted models."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import InvalidTypeError
from cases import each_family


def model():
    """Convolutions with batch norms behind them."""
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    return nn.Sequential(*layers, nn.BatchNorm2d(4))


@each_family
def test_fx_traces_a_converted_model_as_the_plain_one(family):
    plain = model()
    nodes = [str(node) for node in torch.fx.symbolic_trace(plain).graph.nodes]
    converted = bnstats.convert_batchnorm(plain, family.name)
    twin = copy.deepcopy(converted)
    traced = torch.fx.symbolic_trace(converted)
    assert [str(node) for node in traced.graph.nodes] == nodes
    for training in (True, True, False):
        x = torch.randn(4, 3, 6, 6)
        outputs = [m.train(training)(x) for m in (traced, twin)]
        assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(traced.state_dict(), twin.state_dict(), rtol=0, atol=0)
    for mine, own in zip(traced.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, own.grad)
    reverted = bnstats.revert_batchnorm(traced)
    torch.testing.assert_close(reverted(x), outputs[1])


def test_fx_traces_a_centered_layer_with_a_forward_of_its_own():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x * 2, self.weight, self.bias)

    layers = nn.Sequential(Scaled(3, 4, 3), nn.BatchNorm2d(4))
    converted = bnstats.convert_batchnorm(layers, "moving_average").eval()
    traced, x = torch.fx.symbolic_trace(converted), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        converted[0].weight.mul_(3)  # no constant of the graph
    assert torch.equal(traced(x), converted(x))


@each_family
def test_a_mask_is_an_input_of_the_graph(family):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = family.make(1)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    layer, x, mask = Masked(), torch.randn(4, 3, 5), torch.rand(4, 5) > 0.5
    twin = copy.deepcopy(layer)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x, mask), twin(x, mask))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_names_a_centered_layer_too():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x * 2, self.weight, self.bias)

    own, _ = bnstats.convert_batchnorm(
        nn.Sequential(Scaled(3, 4, 3), nn.BatchNorm2d(4)), "moving_average"
    )
    layers = bnstats.CenteredConv1d(3, 4, 1), bnstats.CenteredConv2d(3, 4, 1)
    for layer in (own, *layers, bnstats.CenteredConv3d(3, 4, 1), bnstats.CenteredLinear(3, 4)):
        with pytest.raises(InvalidTypeError, match=f"{type(layer).__name__}: .*revert_batchnorm"):
            torch.jit.script(layer)


@each_family
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_names_the_layer_and_the_way_out(family, training):
    converted = nn.Sequential(family.make(2)).train(training)
    with pytest.raises(InvalidTypeError, match="revert_batchnorm"):
        torch.jit.script(converted)
    reverted = torch.jit.script(bnstats.revert_batchnorm(converted))
    assert reverted(torch.randn(4, 3, 5, 5)).shape == (4, 3, 5, 5)
