"""CenteredConv and CenteredLinear: torch's layers with weights of mean zero."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnstats

CASES = [
    (bnstats.CenteredLinear, nn.Linear, (4, 3), {}, (5, 4)),
    (bnstats.CenteredConv1d, nn.Conv1d, (4, 6, 3), {}, (2, 4, 9)),
    (bnstats.CenteredConv2d, nn.Conv2d, (4, 6, 3), {"groups": 2, "stride": 2}, (2, 4, 9, 8)),
    (bnstats.CenteredConv2d, nn.Conv2d, (4, 6, 3), {"padding": 1, "bias": False}, (2, 4, 5, 5)),
    (
        bnstats.CenteredConv2d,
        nn.Conv2d,
        (4, 6, 3),
        {"padding": 1, "padding_mode": "reflect"},
        (2, 4, 5, 5),
    ),
    (bnstats.CenteredConv3d, nn.Conv3d, (2, 3, 2), {"dilation": 2}, (2, 2, 5, 5, 5)),
]


@pytest.mark.parametrize(("centered", "plain", "args", "options", "shape"), CASES)
class TestCentered:
    def test_output_is_the_plain_layers_with_the_centered_weight(
        self, centered, plain, args, options, shape
    ):
        layer, reference = centered(*args, **options), plain(*args, **options)
        reference.load_state_dict(layer.state_dict(), strict=True)
        weight = reference.weight.data
        for row in weight:
            row -= row.mean()
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), reference(x))

    def test_is_an_instance_with_the_same_keys_parameters_and_start(
        self, centered, plain, args, options, shape
    ):
        torch.manual_seed(3)
        layer = centered(*args, **options)
        torch.manual_seed(3)
        reference = plain(*args, **options)
        assert isinstance(layer, plain)
        assert list(layer.state_dict()) == list(reference.state_dict())
        for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert layer(torch.randn(shape)).shape == reference(torch.randn(shape)).shape

    def test_leaves_its_weight_alone(self, centered, plain, args, options, shape):
        layer = centered(*args, **options)
        before = copy.deepcopy(layer.weight.data)
        layer(torch.randn(shape)).sum().backward()
        assert torch.equal(layer.weight, before)

    def test_weight_gradient_has_no_mean(self, centered, plain, args, options, shape):
        layer = centered(*args, **options)
        layer(torch.randn(shape)).square().sum().backward()
        mean = layer.weight.grad.flatten(1).mean(1)
        assert mean.abs().max() < 1e-5 * layer.weight.grad.abs().max()

    def test_gradients_are_those_of_the_output(self, centered, plain, args, options, shape):
        layer = centered(*args, **options).double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        parameters = dict(layer.named_parameters())

        def run(x, *values):
            named = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(layer, named, (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)

    def test_under_autocast_runs_in_the_low_dtype(self, centered, plain, args, options, shape):
        layer = centered(*args, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(shape)).dtype == torch.bfloat16


def test_a_constant_added_to_every_input_changes_nothing():
    layer = bnstats.CenteredLinear(8, 3).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x + 100), layer(x))


def test_takes_device_and_dtype():
    layer = bnstats.CenteredConv2d(2, 3, 1, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.float64


def test_compiles_without_a_graph_break():
    layer = bnstats.CenteredConv2d(3, 4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), layer(x))


def test_linear_under_moving_average_needs_no_mean():
    # The claim that the mean can be left out: with centered weights and inputs of one mean,
    # its output has a mean near zero, for any mean of its input.
    x = torch.randn(512, 64) + 5
    ours = bnstats.CenteredLinear(64, 32)(x).mean(0).abs().mean()
    plain = F.linear(x, nn.Linear(64, 32).weight).mean(0).abs().mean()
    assert ours < 0.1 * plain
