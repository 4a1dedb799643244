"""A batch of weight 1 replaces the running statistics: nothing of what was there stays."""

import math

import pytest
import torch
from torch import nn

import bnstats
import oracles
from cases import built, state

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = [math.nan, math.inf, -math.inf, 1e8, 1e30]


def ema(**options):
    return built(bnstats.EMABatchNorm2d, 3, **options)


def cumulative(**options):
    return built(bnstats.CumulativeBatchNorm2d, 3, **options)


REPLACING = {
    "cumulative, first batch": cumulative,
    "cumulative, momentum 1": lambda: cumulative(momentum=1.0),
    "debiased, first batch": ema,
    "debiased, not pooled, first batch": lambda: ema(pooled=False),
    "per batch, first batch": lambda: ema(momentum=None),
    "momentum 1": lambda: ema(momentum=1.0),
    "momentum 1, not debiased": lambda: ema(momentum=1.0, debias=False),
    "momentum 1, torch's rule": lambda: ema(momentum=1.0, debias=False, pooled=False),
}

each_replacing = pytest.mark.parametrize("make", REPLACING.values(), ids=REPLACING.keys())


def spoil(layer, value):
    """Have channel 0 a mean, and channel 1 a variance, that no batch had."""
    layer.running_mean[0] = value
    layer.running_var[1] = abs(value)


def assert_is_the_batchs(layer, x):
    mean, var = oracles.mean_var([x])
    # float32, of numbers about 1.
    torch.testing.assert_close(layer.running_mean.double().numpy(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double().numpy(), var, rtol=1e-6, atol=0)


@each_replacing
def test_the_old_statistics_leave_nothing_behind(run, make):
    layer = make()
    for value in BAD:
        layer.reset_running_stats()
        spoil(layer, value)
        x = torch.randn(4, 3, 5, 5)
        run(layer, x)
        assert_is_the_batchs(layer, x)
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("make", [v for k, v in REPLACING.items() if "momentum 1" in k])
def test_nor_do_they_in_the_middle_of_training(run, make):
    layer = make()
    for value in BAD:
        layer(torch.randn(4, 3, 5, 5))
        spoil(layer, value)
        x = torch.randn(4, 3, 5, 5)
        run(layer, x)
        assert_is_the_batchs(layer, x)


@each_replacing
def test_what_comes_next_is_that_of_a_layer_that_was_new(run, make):
    layer, new = make(), make()
    spoil(layer, math.nan)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        run(layer, x)
        run(new, x)
    ours, theirs = state(layer), state(new)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@each_replacing
def test_a_batch_that_is_not_finite_replaces_nothing(run, make):
    layer = make()
    spoil(layer, 1e8)
    before = state(layer)
    x = torch.randn(4, 3, 5, 5)
    x[0, 2, 0, 0] = math.nan
    run(layer, x)
    for key in nn.BatchNorm2d(3).state_dict():
        assert torch.equal(layer.state_dict()[key], before[key]), key


@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("value", BAD)
def test_about_zero_the_old_mean_square_leaves_nothing_behind(run, momentum, value):
    layer = built(bnstats.MovingAverageBatchNorm2d, 3, momentum=momentum)
    layer.running_var[1] = abs(value)
    x = torch.randn(4, 3, 5, 5)
    run(layer, x)
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-6, atol=0)


def test_a_channel_that_no_weight_replaces_stays_bad():
    # With a weight below 1, NaN is part of the average: nothing is invented in its place.
    layer = ema(debias=False)
    spoil(layer, math.nan)
    layer(torch.randn(4, 3, 5, 5))
    assert layer.running_mean.isnan().tolist() == [True, False, False]
