"""Messages to users: where a warning points, and which name an error suggests."""

import linecache
import pickle
import warnings

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import BnstatsWarning, UnknownLayerError


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


def resnet_like():
    """Layers by the names of a ResNet-18."""
    blocks = {
        f"layer{i}.{j}.bn{k}": nn.BatchNorm1d(2)
        for i in range(1, 5)
        for j in (0, 1)
        for k in (1, 2)
    }
    model = nn.Module()
    for path, layer in {"bn1": nn.BatchNorm1d(2), **blocks}.items():
        *parents, name = path.split(".")
        parent = model
        for key in parents:
            if not hasattr(parent, key):
                parent.add_module(key, nn.Module())
            parent = getattr(parent, key)
        parent.add_module(name, layer)
    return model


def mappings():
    model = resnet_like()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]

    def forward(_, x):
        for layer in layers:
            layer(x)

    data = list(torch.randn(3, 8, 2))
    result = bnstats.recompute_population_stats(model, data, forward=forward)
    yield "statistics", result.after
    yield "drift_from", result.after.drift_from(model)
    yield "drift", result.drift
    yield "before", result.before
    yield "running error", bnstats.estimate_running_error(result.after)
    with bnstats.record_batch_stats(model) as record:
        yield "record", record


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("layer1.bn1", "layer1.0.bn1"),
        ("layer4.1.bn22", "layer4.1.bn2"),
        ("model.layer3.0.bn2", "layer3.0.bn2"),
        ("bn", "bn1"),
        ("", "bn1"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_nearest_by_whole_path(typed, nearest):
    for what, mapping in mappings():
        with pytest.raises(UnknownLayerError) as caught:
            mapping[typed]
        assert str(caught.value) == (
            f"there is no BatchNorm layer {typed!r}; the nearest name is {nearest!r}"
        ), what
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, ValueError)
        assert typed not in mapping
        assert mapping.get(typed, 5) == 5
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_name_asked_of_nothing_says_so():
    with pytest.raises(UnknownLayerError, match="no BatchNorm layer 'bn1', nor any other"):
        bnstats.PopulationStats({})["bn1"]
