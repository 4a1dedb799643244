"""What users are told: where a warning points, and which name an error suggests."""

import linecache
import warnings

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import BnstatsWarning


def convert_far_from_zero():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(5.0)
    bnstats.convert_batchnorm(nn.Sequential(nn.Linear(3, 3), layer), "moving_average")


def load_far_from_zero():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(5.0)
    deep = nn.Sequential(nn.Sequential(bnstats.MovingAverageBatchNorm1d(3)))
    deep.load_state_dict(nn.Sequential(nn.Sequential(layer)).state_dict())


def measure_without_layers():
    bnstats.measure_population_stats(nn.Linear(3, 3), [torch.randn(4, 3)])


def recompute_without_layers():
    bnstats.recompute_population_stats(nn.Linear(3, 3), [torch.randn(4, 3)])


def leave_a_layer_out(method):
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    bnstats.recompute_population_stats(
        model, [torch.randn(4, 3)], method=method, forward=lambda model, x: model[0](x)
    )


def sweep_without_rest():
    class Unstable(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x + 40 * self.bn(x).sin())

    torch.manual_seed(0)
    bnstats.recompute_population_stats(Unstable(), list(torch.randn(3, 8, 3)), method="sweeps")


WARNINGS = {
    "convert": convert_far_from_zero,
    "load_state_dict": load_far_from_zero,
    "measure": measure_without_layers,
    "recompute": recompute_without_layers,
    **{
        f"unreached layer, {method}": lambda method=method: leave_a_layer_out(method)
        for method in ("pooled", "layerwise", "sweeps")
    },
    "sweeps": sweep_without_rest,
}


@pytest.mark.parametrize("provoke", WARNINGS.values(), ids=WARNINGS.keys())
def test_a_warning_points_to_the_first_line_outside_of_bnstats_and_torch(provoke):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        provoke()
    assert caught
    assert {w.category for w in caught} == {BnstatsWarning}
    for warning in caught:
        assert warning.filename == __file__
        line = linecache.getline(__file__, warning.lineno)
        assert "bnstats." in line or "load_state_dict" in line
