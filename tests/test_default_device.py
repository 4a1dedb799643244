"""Another default device than the model's changes nothing."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from default_device import set_for_all
from networks import trained, uneven

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


@pytest.mark.parametrize("default", [torch.device, set_for_all], ids=["with", "set"])
@pytest.mark.parametrize("method", METHODS)
def test_the_statistics_are_the_models_whatever_the_default_device(default, method):
    model, data = trained(), uneven()
    twin = copy.deepcopy(model)
    expected = bnstats.recompute_population_stats(twin, data, method=method).after
    with default("meta"):
        result = bnstats.recompute_population_stats(model, data, method=method, tolerance=1e-9)
        text = str(result)
    assert "5" in text
    for name, stats in expected.items():
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            mine, other = getattr(result.after[name], field), getattr(stats, field)
            assert mine.device.type == "cpu"
            assert torch.equal(mine, other), (name, field)
    assert torch.equal(model[8].running_var, expected["8"].var.float())


@pytest.mark.parametrize("default", [torch.device, set_for_all], ids=["with", "set"])
@pytest.mark.parametrize("method", METHODS)
def test_a_forward_sees_the_callers_default_device(default, method):
    made = []

    class Making(nn.Module):
        def forward(self, x):
            made.append(torch.empty(2).device.type)
            return x

    model = nn.Sequential(nn.BatchNorm1d(3), Making(), nn.BatchNorm1d(3))
    data = list(torch.randn(3, 8, 3))
    with default("meta"):
        bnstats.measure_population_stats(model, data, method=method)
    assert set(made) == {"meta"}
