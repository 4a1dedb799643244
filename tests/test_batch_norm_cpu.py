"""Large CPU batches are normalized by the fast sums: what comes out is nn.BatchNorm's."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad

import bnstats
from bnstats import reduction
from bnstats.layers import batch_norm_cpu

SHAPES = [(4, 64, 32, 32), (8, 8, 4096), (2, 3, 36, 36, 36)]


def calls_of(name, monkeypatch, module=batch_norm_cpu):
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.fixture
def taken(monkeypatch):
    """Says how often the fast sums were taken, or tried in vain."""
    return calls_of("from_rows", monkeypatch)


@pytest.fixture
def served(monkeypatch):
    """Says how often they served."""
    return calls_of("normalize", monkeypatch)


def twins(shape, family="EMA", dtype=torch.float32, **options):
    """Return nn.BatchNorm and a layer of ours, with the same random weights."""
    name = f"BatchNorm{len(shape) - 2}d"
    theirs = getattr(nn, name)(shape[1], dtype=dtype, **options)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = getattr(bnstats, family + name)(shape[1], dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * weights).sum().backward()
    return [output, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("family", ["EMA", "Cumulative"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 100.0])  # where the fast sums do, and where they do not
def test_output_and_gradients_are_those_of_nn_batchnorm(taken, family, shape, affine, offset):
    theirs, ours = twins(shape, family, affine=affine)
    x, weights = torch.randn(shape) * 3 + offset, torch.randn(shape)
    for expected, actual in zip(
        gradients(theirs, x, weights), gradients(ours, x, weights), strict=True
    ):
        # float32's rounding: of x that is offset / 3 deviations from 0, and of sums of 2^18
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert taken


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_exact(taken, shape):
    theirs, ours = twins(shape, dtype=torch.float64)
    x, weights = torch.randn(shape, dtype=torch.float64) - 5, torch.randn(shape)
    for expected, actual in zip(
        gradients(theirs, x, weights), gradients(ours, x, weights), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert taken


def test_running_statistics_are_those_of_the_definition(taken):
    layer = bnstats.CumulativeBatchNorm2d(64)
    data = torch.randn(12, 64, 32, 32) * 2 + torch.arange(64.0).view(-1, 1, 1)
    for batch in data.split([4, 8]):
        layer(batch)
    values = data.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=2e-6, atol=0)
    assert len(taken) == 2


def test_second_derivatives_are_those_of_nn_batchnorm(taken):
    shape = SHAPES[0]
    x, weights, seconds = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    results = []
    for layer in twins(shape, dtype=torch.float64):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((layer(z) * weights).sum(), z, create_graph=True)
        inputs = (z, layer.weight)
        results.append(torch.autograd.grad((first * seconds).sum(), inputs))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert taken


def test_only_what_requires_a_gradient_gets_one(taken):
    _, layer = twins(SHAPES[0])
    layer.weight.requires_grad_(False)
    layer(torch.randn(SHAPES[0])).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert taken


def normalized(x, mean=None):
    channels = torch.ones(x.shape[1])
    zeros = torch.zeros_like(channels)
    expected = (zeros if mean is None else mean, channels)
    return batch_norm_cpu.batch_norm(x, channels, zeros, 1e-5, expected)


@pytest.mark.parametrize("offset", [100.0, 1e4])
@pytest.mark.parametrize("channels", [16, 17, 64])
def test_where_sums_cancel_the_statistics_are_those_of_the_definition(served, channels, offset):
    x = torch.randn(16, 64, 32, 32)
    x[:, :channels] += offset * torch.arange(1.0, channels + 1).view(-1, 1, 1).sqrt()
    _, mean, var = normalized(x)
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)).float(), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(var, wide.var((0, 2, 3)).float(), rtol=2e-6, atol=0)
    assert served


@pytest.mark.parametrize("channels", [16, 17, 64])
def test_where_channels_of_few_samples_cancel_the_statistics_are_those_of_the_definition(
    served, channels
):
    x = torch.randn(SHAPES[0])
    x[:, :channels] += 100
    _, mean, var = normalized(x)
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)).float(), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(var, wide.var((0, 2, 3)).float(), rtol=2e-6, atol=0)
    assert served


@pytest.mark.parametrize("offset", [-200.0, 0.0, 1e4, torch.inf, torch.nan])
def test_an_expected_mean_that_is_wrong_does_not_spoil_the_sums(served, offset):
    x = torch.randn(32, 64, 32, 32) + 100
    _, mean, var = normalized(x, torch.full([64], 100 + offset))
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, wide.var((0, 2, 3)).float(), rtol=2e-6, atol=0)
    assert len(served) == (offset != torch.inf)


def test_sums_about_an_expected_mean_are_taken_once(monkeypatch):
    x = torch.randn(32, 64, 32, 32) + 100
    passes = calls_of("_from_sums", monkeypatch, reduction)
    normalized(x)
    assert len(passes) == 2
    normalized(x, torch.full([64], 99.0))
    assert len(passes) == 3


def test_rows_without_a_divisor_are_left_to_torch(served):
    normalized(torch.randn(8, 8, 4099))
    assert not served


def test_a_batch_that_is_not_finite_changes_nothing(taken):
    _, layer = twins(SHAPES[0])
    layer(torch.randn(SHAPES[0]))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(SHAPES[0])
    x[1, 2, 3, 4] = torch.nan
    output = layer(x)
    assert output[:, 2].isnan().all()
    assert output[:, 3].isfinite().all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert len(taken) == 2


class TestLeftToTorch:
    """What the fast sums are not made for works as it does in nn.BatchNorm."""

    def test_small_half_and_channels_last_inputs(self, taken):
        layer = bnstats.EMABatchNorm2d(64)
        layer(torch.randn(2, 64, 8, 8))
        layer(torch.randn(SHAPES[0], dtype=torch.bfloat16))
        layer(torch.randn(SHAPES[0]).to(memory_format=torch.channels_last))
        assert not taken

    # torch's own: its first use loads decompositions that torch has deprecated
    def test_forward_mode_derivatives(self, taken):
        x, tangent = torch.randn(2, *SHAPES[0])
        results = []
        for layer in twins(SHAPES[0]):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, tangent)
                results.append(forward_ad.unpack_dual(layer(dual)).tangent)
        torch.testing.assert_close(results[1], results[0])
        assert not taken

    def test_function_transforms(self, taken):
        x = torch.randn(SHAPES[0])
        results = []
        for layer in twins(SHAPES[0]):

            def loss(weights, buffers, layer=layer):
                return functional_call(layer, {**weights, **buffers}, (x,)).pow(3).sum()

            weights, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
            results.append(grad(loss)(weights, buffers))
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected)
        assert not taken

    def test_shapes_without_numbers(self, taken):
        with FakeTensorMode():
            layer = bnstats.EMABatchNorm2d(64)
            assert layer(torch.randn(SHAPES[0])).shape == SHAPES[0]
        assert not taken


@pytest.mark.parametrize("shape", [(8, 64, 72, 72), (3, 6, 390, 401), (2, 1, 9, 1 << 17)])
def test_statistics_of_large_inputs_that_are_read_in_parts_are_those_of_the_definition(shape):
    x = torch.randn(shape) * 2 + 1
    assert x.numel() >= reduction._MANY
    mean, m2 = reduction.mean_and_m2(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, expected = torch.var_mean(x.double(), axes, correction=0)
    # Row sums have a relative error of some 2e-7, and the mean of the squares is 1.25 variances.
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2 / (x.numel() // shape[1]), var, rtol=1e-6, atol=0)
