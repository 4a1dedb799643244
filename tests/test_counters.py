"""What counts, and once: momentum 0 moves nothing, and a counter may be taken away."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import cases
import paths
from cases import each_family

pytestmark = pytest.mark.usefixtures("one_thread")

# The moving average has a window that is full, and another that is filling.
WINDOWS = {"window": 4, "warmup": 3, "renorm_warmup": 6}


def make(family, **options):
    if family.name == "moving_average":
        options = {**WINDOWS, **options}
    return family.make(2, **options)


def trained(family, steps, **options):
    layer = make(family, **options)
    for x in cases.batches((4, 3, 5, 5), steps):
        layer(x.requires_grad_()).square().sum().backward()
    layer.zero_grad()
    return layer


def buffers(layer):
    """Every buffer, those included that no checkpoint has."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def forward_backward(run, layer, x):
    """What a step makes: output and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = run(layer, x)
    output.pow(3).sum().backward()
    return output.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


@each_family
@pytest.mark.parametrize("steps", [0, 9])
def test_momentum_0_moves_nothing_forward_or_backward(run, family, steps):
    layer = trained(family, steps)
    before = buffers(layer)
    layer.momentum = 0
    for x in (*cases.batches((4, 3, 5, 5), 3), torch.full((4, 3, 5, 5), math.nan)):
        forward_backward(run, layer, x)
        assert_same(buffers(layer), before)


@each_family
@pytest.mark.parametrize("steps", [0, 9])
def test_momentum_0_normalizes_as_any_other(run, family, steps):
    layer = trained(family, steps)
    other = copy.deepcopy(layer)
    layer.momentum = 0
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    for ours, theirs in zip(
        forward_backward(run, layer, x), forward_backward(run, other, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@each_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_momentum_0_moves_nothing_in_a_checkpoint_either(family, use_reentrant):
    layer = trained(family, 9)
    other = copy.deepcopy(layer)
    layer.momentum = other.momentum = 0
    before = buffers(layer)

    def checkpointed(layer, x):
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    x = torch.randn(4, 3, 5, 5)
    for ours, theirs in zip(
        forward_backward(checkpointed, layer, x),
        forward_backward(paths.directly, other, x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert_same(buffers(layer), before)


@each_family
def test_training_goes_on_after_momentum_0_as_if_nothing_had_been(run, family):
    layer = trained(family, 9)
    other, momentum = copy.deepcopy(layer), layer.momentum
    layer.momentum = 0
    forward_backward(run, layer, torch.randn(4, 3, 5, 5))
    layer.momentum = momentum
    for x in cases.batches((4, 3, 5, 5), 5):
        forward_backward(run, layer, x)
        forward_backward(run, other, x)
    assert_same(buffers(layer), buffers(other))


@each_family
def test_a_layer_may_be_made_with_momentum_0(run, family):
    layer = make(family, momentum=0)
    before = buffers(layer)
    forward_backward(run, layer, torch.randn(4, 3, 5, 5))
    assert_same(buffers(layer), before)


@each_family
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_layer_without_torchs_counter_trains_and_evaluates(run, family, momentum):
    layer = make(family, momentum=momentum)
    layer.num_batches_tracked = None
    for x in cases.batches((4, 3, 5, 5), 3):
        forward_backward(run, layer, x)
    assert layer.num_batches_tracked is None
    assert "num_batches_tracked" not in layer.state_dict()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    layer.eval()
    layer(x)
    copy.deepcopy(layer)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_without_a_counter_the_plain_rule_is_still_torchs(run, momentum):
    options = {"momentum": momentum, "debias": False, "pooled": False}
    layer = cases.built(bnstats.EMABatchNorm2d, 3, **options)
    plain = nn.BatchNorm2d(3, momentum=momentum)
    layer.num_batches_tracked = plain.num_batches_tracked = None
    for x in cases.batches((4, 3, 5, 5), 3):
        run(layer, x)
        plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_without_a_counter_a_debiased_average_is_one_that_has_forgotten_its_start(run):
    layer = bnstats.EMABatchNorm2d(3, momentum=0.1)
    other = bnstats.EMABatchNorm2d(3, momentum=0.1)
    layer.num_batches_tracked = None
    other.num_batches_tracked.fill_(10_000)
    for x in cases.batches((4, 3, 5, 5), 3):
        run(layer, x)
        run(other, x)
    torch.testing.assert_close(layer.running_mean, other.running_mean)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_a_cumulative_average_counts_values_and_needs_no_other_counter(run):
    layer, other = (bnstats.CumulativeBatchNorm2d(3) for _ in range(2))
    layer.num_batches_tracked = None
    for x in cases.batches((4, 3, 5, 5), 3):
        run(layer, x)
        run(other, x)
    assert layer.num_values_tracked == 300
    assert torch.equal(layer.running_mean, other.running_mean)
    assert torch.equal(layer.running_var, other.running_var)


@each_family
def test_a_batch_counts_once_on_every_path(run, family):
    layer = make(family)
    for count, n in enumerate((2, 4, 3), start=1):
        forward_backward(run, layer, torch.randn(n, 3, 5, 5))
        assert layer.num_batches_tracked == count
    run(layer, torch.full((4, 3, 5, 5), math.inf))
    assert layer.num_batches_tracked == 3
    if hasattr(layer, "num_values_tracked"):
        assert layer.num_values_tracked == (2 + 4 + 3) * 25
    if hasattr(layer, "num_steps_tracked"):
        assert layer.num_steps_tracked == 3
