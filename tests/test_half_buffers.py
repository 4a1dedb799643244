"""Running statistics in half precision: what they cannot hold does not count."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import cases
from bnstats.errors import BnstatsWarning, NonFiniteStatisticsError
from cases import each_family

pytestmark = pytest.mark.usefixtures("one_thread")

LARGEST = torch.finfo(torch.float16).max


def half(family, **options):
    """A layer of float16 that has seen a few batches."""
    layer = family.make(2, **options).half()
    for x in cases.batches((4, 3, 5, 5), dtype=torch.float16):
        layer(x)
    return layer


def buffers(layer):
    """Every buffer, those included that no checkpoint has."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


# A finite batch: of the variance 9e6, of which a tenth is more than float16's largest number too.
def overflowing():
    return (torch.randn(4, 3, 5, 5) * 3000).half()


@each_family
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_batch_that_overflows_them_changes_nothing(run, family, momentum):
    layer = half(family, momentum=momentum)
    before = buffers(layer)
    x = overflowing()
    assert x.isfinite().all()
    run(layer, x)
    assert_same(buffers(layer), before)


@each_family
def test_a_first_batch_that_overflows_them_changes_nothing(run, family):
    layer = family.make(2).half()
    before = buffers(layer)
    run(layer, overflowing())
    assert_same(buffers(layer), before)


@each_family
def test_training_goes_on_after_it(run, family):
    layer = half(family)
    other = copy.deepcopy(layer)
    run(layer, overflowing())
    for x in cases.batches((4, 3, 5, 5), dtype=torch.float16):
        run(layer, x)
        run(other, x)
    assert_same(buffers(layer), buffers(other))
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@each_family
def test_it_is_normalized_all_the_same(run, family):
    layer = half(family)
    wide, x = copy.deepcopy(layer).float(), overflowing()
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    output, expected = run(layer, a), wide(b)
    grad = torch.randn_like(expected)
    output.backward(grad.half())
    expected.backward(grad)
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)
    # Of about 1 / 3000, in half of the smallest normal number's steps.
    torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=2e-6)


@cases.normalizing_as_torch
def test_nor_does_a_mean_that_overflows_them(run, family):
    layer = half(family)
    before = buffers(layer)
    # Of float32, as autocast leaves it before a half layer: the mean alone is too large, though
    # it would not be in an average.
    x = torch.randn(4, 3, 5, 5)
    x[:, 1] += 20 * LARGEST
    run(layer, x)
    assert_same(buffers(layer), before)


@each_family
def test_what_they_can_hold_counts(run, family):
    # The batch's own variance is more than float16 can hold, its part in the average is not.
    layer = half(family, momentum=0.1)
    batches = layer.num_batches_tracked.item()
    count = getattr(layer, "num_values_tracked", torch.tensor(0)).item()
    x = (torch.randn(4, 3, 5, 5) * 400).half()
    assert x.float().var() > LARGEST
    run(layer, x)
    assert layer.num_batches_tracked == batches + 1
    assert layer.running_var.isfinite().all()
    assert (layer.running_var > 1e4).all()
    if count:
        assert layer.num_values_tracked == count + 100


@each_family
def test_bfloat16_has_the_room(run, family):
    layer = family.make(2).bfloat16()
    x = overflowing().bfloat16()
    run(layer, x)
    assert layer.num_batches_tracked == 1
    assert layer.running_var.isfinite().all()


def test_torchs_layer_does_not_recover_from_it():
    # What these tests are for; where it no longer holds, the promise may be torch's own.
    plain = nn.BatchNorm2d(3).half()
    plain(overflowing())
    plain(torch.randn(4, 3, 5, 5).half())
    assert not any(math.isfinite(x) for x in plain.running_var)


def test_a_checkpointed_forward_finds_what_it_had_after_a_batch_that_overflows():
    layers = [bnstats.MovingAverageBatchNorm2d(3, window=1).half() for _ in range(2)]
    x = (torch.randn(4, 3, 5, 5) * 100).half()
    inputs = [x.clone().requires_grad_() for _ in layers]
    losses = [
        checkpoint(layer, a, use_reentrant=False).pow(2).sum()
        for layer, a in zip(layers, inputs, strict=True)
    ]
    layers[0](overflowing())
    for loss in losses:
        loss.backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema", "layerwise", "sweeps"])
def test_recalibration_of_a_half_model_names_the_layer_that_cannot_hold_it(method):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [(torch.randn(64, 3) * 3000).half() for _ in range(3)]
    says = "layer '0' .BatchNorm1d.: expected a running_var that float16 holds, up to 65504"
    with pytest.raises(NonFiniteStatisticsError, match=says):
        bnstats.recompute_population_stats(model, data, method=method)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    with pytest.warns(BnstatsWarning, match="layer '0' has a variance"):
        stats = bnstats.measure_population_stats(model, data, method=method)
    with pytest.raises(NonFiniteStatisticsError, match=says):
        stats.apply_to(model)
    stats.apply_to(model.float())
    assert model[0].running_var.isfinite().all()


@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_buffers_whose_data_is_cast_are_those_of_a_half_layer(family, dtype):
    # So does the mixed precision of FSDP (buffer_dtype), in which nn.BatchNorm trains.
    options = {"window": 4, "warmup": 4} if family.name == "moving_average" else {}
    half, cast = (family.make(2, **options) for _ in range(2))
    half.to(dtype)
    for tensor in (*cast.parameters(), *cast.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for x in cases.batches((4, 3, 5, 5), 8, dtype=dtype):
        outputs = [layer(x) for layer in (half, cast)]
        assert torch.equal(*outputs)
        for layer, output in zip((half, cast), outputs, strict=True):
            layer.zero_grad()
            output.square().sum().backward()
        assert torch.equal(half.weight.grad, cast.weight.grad)
    torch.testing.assert_close(cast.state_dict(), half.state_dict(), rtol=0, atol=0)
