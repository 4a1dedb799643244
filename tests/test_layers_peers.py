"""torch's and fvcore's own recalibration work on the layers."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import cases
from cases import normalizing_as_torch


@normalizing_as_torch
def test_torchs_own_recalibration_works(family):
    model = nn.Sequential(nn.Linear(3, 3), family.make(1))
    data = [x @ torch.randn(3, 3) for x in cases.batches((8, 3))]
    update_bn(data, model)
    with torch.no_grad():
        means = torch.stack([model[0](x).mean(0) for x in data])
    torch.testing.assert_close(model[1].running_mean, means.mean(0))
    assert model[1].momentum == family.make(1).momentum


@normalizing_as_torch
def test_fvcores_recalibration_works(family):
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    model = nn.Sequential(nn.Linear(3, 3), family.make(1)).train()
    data = cases.batches((8, 3))
    precise_bn.update_bn_stats(model, data, num_iters=len(data))
    with torch.no_grad():
        together = torch.cat([model[0](x) for x in data])
    torch.testing.assert_close(model[1].running_mean, together.mean(0))
    torch.testing.assert_close(model[1].running_var, together.var(0, correction=0))
    assert model[1].momentum == family.make(1).momentum


@normalizing_as_torch
def test_a_momentum_of_one_means_this_batch_alone(family):
    layer = family.make(1, momentum=1.0)
    for x in cases.batches((8, 3)):
        layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))


@normalizing_as_torch
def test_without_tracking_it_is_torchs_layer(family):
    layer, plain = (
        family.make(1, track_running_stats=False),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(8, 3)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain.eval()(x))
