"""Layers on meta take checkpoints in parts, and a default device of the caller's is no matter."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from cases import each_family, state


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

    if way == "set_default_device":
        torch.set_default_device("meta")
        try:
            use()
        finally:
            torch.set_default_device(None)
    else:
        with torch.device("meta"):
            use()
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    assert not any(buffer.is_meta for buffer in model.buffers())
