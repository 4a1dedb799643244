"""Layers on meta take checkpoints in parts, and a default device of the caller's is no matter."""

import copy
from itertools import permutations

import pytest
import torch
from torch import nn

import bnstats
from cases import each_family, state
from default_device import set_for_all


@each_family
@pytest.mark.parametrize("part", ["running_mean", "running_var", "num_batches_tracked", "weight"])
def test_part_of_a_checkpoint_is_assigned_onto_meta(family, part):
    # as accelerate and torch's own examples load large models, file by file
    trained = family.make(2)
    trained(torch.randn(4, 3, 5, 5))
    with torch.device("meta"):
        layer = family.make(2)
    checkpoint = trained.state_dict()
    first = {part: checkpoint.pop(part)}
    layer.load_state_dict(first, strict=False, assign=True)
    assert not getattr(layer, part).is_meta
    layer.load_state_dict(checkpoint, strict=False, assign=True)
    layer.to("cpu")
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer.eval()(x), trained.eval()(x))


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_whichever_key_of_a_checkpoint_is_assigned_first(family, dtype):
    # a history was taken for missing where the running statistics came after it
    short = {"window": 3, "warmup": 2} if family.name == "moving_average" else {}
    trained = family.make(2, **short).to(dtype)
    for x in torch.randn(4, 4, 3, 5, 5).to(dtype):
        trained(x).square().sum().backward()
    for first in trained.state_dict():
        with torch.device("meta"):
            layer = family.make(2, **short)
        checkpoint = state(trained)
        layer.load_state_dict({first: checkpoint.pop(first)}, strict=False, assign=True)
        layer.load_state_dict(checkpoint, strict=False, assign=True)
        twin = copy.deepcopy(trained)
        for x in torch.randn(4, 4, 3, 5, 5).to(dtype):
            for net in (layer, twin):
                net(x).square().sum().backward()
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value, msg=f"{first}, {name}")


@each_family
def test_a_plain_checkpoint_assigned_key_by_key_is_one_assigned_at_once(family):
    plain = nn.BatchNorm2d(3)
    for x in torch.randn(4, 4, 3, 5, 5):
        plain(1e-5 * x)  # a mean near zero, of which moving averages do not warn
    expected = family.make(2)
    expected.load_state_dict(plain.state_dict())
    for order in permutations(plain.state_dict()):
        with torch.device("meta"):
            layer = family.make(2)
        checkpoint = state(plain)
        for key in order:
            layer.load_state_dict({key: checkpoint[key]}, strict=False, assign=True)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(expected.named_buffers()))
        assert torch.equal(checkpoint["running_mean"], plain.running_mean)  # the caller's own


def test_a_mean_that_comes_apart_from_its_variance_is_warned_of_too():
    with torch.device("meta"):
        layer = bnstats.MovingAverageBatchNorm2d(3)
    layer.load_state_dict({"running_mean": torch.ones(3)}, strict=False, assign=True)
    with pytest.warns(bnstats.BnstatsWarning, match="running_mean is not near zero"):
        layer.load_state_dict({"running_var": torch.ones(3)}, strict=False, assign=True)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.full((3,), 2.0))


@each_family
@pytest.mark.parametrize("way", ["set_default_device", "with torch.device"])
def test_a_default_device_does_not_reach_into_a_layer_on_cpu(family, way):
    layer = family.make(2)
    twin = copy.deepcopy(layer)
    plain = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    xs = [torch.randn(4, 3, 5, 5).requires_grad_() for _ in range(4)]
    for x in xs:
        twin(x).square().sum().backward()

    def use():
        for x in xs:
            layer(x).square().sum().backward()
        layer.load_state_dict(state(layer))
        copy.deepcopy(layer).load_state_dict(plain.state_dict())
        bnstats.convert_batchnorm(model, family.name)(xs[0])
        bnstats.revert_batchnorm(model)

    with set_for_all("meta") if way == "set_default_device" else torch.device("meta"):
        use()
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("way", ["set_default_device", "with torch.device"])
def test_a_default_device_does_not_reach_into_statistics(way):
    shards = [
        bnstats.measure_population_stats(nn.BatchNorm1d(3), list(torch.randn(4, 8, 3)))
        for _ in range(2)
    ]
    expected = shards[0].merge(shards[1])[""]
    with set_for_all("meta") if way == "set_default_device" else torch.device("meta"):
        merged = shards[0].merge(shards[1])[""]
    for name in ("mean", "var", "mean_stderr", "var_stderr", "sample_spread"):
        torch.testing.assert_close(getattr(merged, name), getattr(expected, name))
