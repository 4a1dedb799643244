"""The two families' own rules, against their definitions in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import cases
import oracles
from bnstats import CumulativeBatchNorm1d, EMABatchNorm1d, EMABatchNorm2d

each_shape = pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES.keys())
EMA, CUMULATIVE = cases.FAMILIES[:2]


@each_shape
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_ema_follows_its_recursion(shape, debias, pooled, dtype, rtol):
    dims, size = shape
    layer = EMA.make(dims, momentum=0.3, debias=debias, pooled=pooled, dtype=dtype)
    data = cases.batches(size, 7, dtype=dtype)
    for x in data:
        layer(x)
    mean, var = oracles.exponential(
        [x.double().numpy() for x in data], 0.3, debias=debias, pooled=pooled
    )
    np.testing.assert_allclose(layer.running_mean, mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.running_var, var, rtol=rtol)
    assert int(layer.num_batches_tracked) == 7


@each_shape
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_ema_neither_debiased_nor_pooled_is_torchs_average(shape, momentum):
    dims, size = shape
    layer = EMA.make(dims, momentum=momentum, debias=False, pooled=False)
    plain = cases.PLAIN[dims](3, momentum=momentum)
    for x in cases.batches(size):
        layer(x)
        plain(x)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_debiased_ema_is_right_from_the_first_batch():
    layer, x = EMABatchNorm1d(3), torch.randn(16, 3) * 7 + 40
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))


def test_a_checkpoint_without_a_counter_is_not_thrown_away_by_the_first_batch():
    # torchvision's first ImageNet weights have no num_batches_tracked; torch takes it to be 0:
    # https://github.com/pytorch/pytorch/issues/8481
    plain = nn.BatchNorm2d(3)
    plain.running_mean.fill_(5.0)
    old = {k: v for k, v in plain.state_dict().items() if k != "num_batches_tracked"}
    layer = EMABatchNorm2d(3, momentum=0.1, pooled=False)
    layer.load_state_dict(old)
    layer(torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 4.5), atol=0.1, rtol=0)


def test_nor_is_one_whose_counter_torch_saved_as_zero():
    plain = nn.BatchNorm2d(3)
    plain.running_mean.fill_(5.0)
    layer = EMABatchNorm2d(3, momentum=0.1, pooled=False)
    layer.load_state_dict(plain.state_dict())
    layer(torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 4.5), atol=0.1, rtol=0)


@pytest.mark.parametrize("momentum", [1e-17, 1e-8, 3e-4, 0.1, 1.0])
def test_debiasing_loses_no_digits_to_a_small_momentum(momentum):
    x = torch.randn(64, 4) + 10
    torch._dynamo.reset()  # it compiles a forward for eight momenta at most
    for compiled in (False, True):
        layer = cases.built(EMABatchNorm1d, 4, momentum=momentum)
        run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
        run(x)
        torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-5, atol=0)


@each_shape
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cumulative_is_the_statistics_of_all_values_uneven_batches_included(shape, dtype, rtol):
    dims, size = shape
    layer = CUMULATIVE.make(dims, dtype=dtype)
    data = cases.batches(size, 4, dtype=dtype) + cases.batches((2, *size[1:]), 5, dtype=dtype)
    for x in data:
        layer(x)
    mean, var = oracles.mean_var([x.double().numpy() for x in data])
    np.testing.assert_allclose(layer.running_mean, mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.running_var, var, rtol=rtol)
    assert int(layer.num_values_tracked) == sum(x.numel() // 3 for x in data)


def test_cumulative_forgets_a_small_first_batch_without_cancelling():
    # What is kept has the weight 1e-6: the term to take off by is next to the whole.
    layer = CumulativeBatchNorm1d(1)
    data = [torch.tensor([[-2345.678], [2400.123]]), torch.randn(1_000_000, 1) * 0.1]
    for x in data:
        layer(x)
    _, var = oracles.mean_var([x.double().numpy() for x in data], correction=1)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)


def test_cumulative_starts_anew_at_a_reset():
    layer = CumulativeBatchNorm1d(3)
    first, second = cases.batches((8, 3), 2)
    layer(first)
    layer.reset_running_stats()
    layer(second)
    torch.testing.assert_close(layer.running_mean, second.mean(0))
    torch.testing.assert_close(layer.running_var, second.var(0))


def test_cumulative_replaces_a_plain_checkpoints_statistics_with_the_first_batch():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(8, 3) + 9)
    layer = CumulativeBatchNorm1d(3)
    layer(torch.randn(8, 3))
    layer.load_state_dict(plain.state_dict())
    assert int(layer.num_values_tracked) == 0
    x = torch.randn(8, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def test_cumulative_with_momentum_one_counts_the_latest_batch_alone():
    layer = cases.built(CumulativeBatchNorm1d, 3, momentum=1.0)
    for n in (8, 6, 4):
        layer(torch.randn(n, 3))
    assert int(layer.num_values_tracked) == 4
    layer(torch.full((5, 3), float("nan")))
    assert int(layer.num_values_tracked) == 4
