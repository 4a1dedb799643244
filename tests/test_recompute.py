"""The pass over data after training: correct statistics for every layer."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import oracles
from bnstats.errors import (
    BnstatsWarning,
)
from memory import count_new_values
from networks import METHODS, snapshot, trained, uneven


def inputs_in_training(model, data):
    """What each BatchNorm sees when batches are normalized by themselves and dropout is off."""
    model = copy.deepcopy(model).eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            seen[name] = []
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append(args[0].detach().double().numpy())
            )
    for x in data:
        model(x)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_those_of_the_definition_uneven_batches_included(method):
    model, data = trained(), uneven()
    seen = inputs_in_training(model, data)
    result = bnstats.recompute_population_stats(model, data, method=method)
    for name, batches in seen.items():
        mean, var = {
            "pooled": lambda b: oracles.mean_var(b),
            "batch_average": lambda b: oracles.batch_average(b),
            "ema": lambda b: oracles.exponential(b, 0.1, debias=True, pooled=False),
        }[method](batches)
        layer, stats = model.get_submodule(name), result.after[name]
        # float32 forwards; normalization with a rounded batch mean differs in the last digits.
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.var, var, rtol=1e-4, atol=1e-6)
        assert stats.count == sum(len(oracles.values(b)) for b in batches)
        assert stats.num_batches == len(batches)
        assert torch.equal(layer.running_mean, stats.mean.float())
        assert torch.equal(layer.running_var, stats.var.float())


def test_ema_starts_from_the_first_batch_and_forgets_the_layers_own_average():
    model, x = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(50, 2)
    model[0].running_mean.fill_(100)
    result = bnstats.recompute_population_stats(model, [x], method="ema")
    np.testing.assert_allclose(result.after["0"].mean, x.double().mean(0), atol=1e-7)


def test_pooled_is_the_same_for_any_split_of_the_first_layers_data():
    x = torch.randn(60, 3) * 3 + 1
    whole = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x])
    parts = bnstats.measure_population_stats(nn.BatchNorm1d(3), x.split([1, 19, 2, 38]))
    torch.testing.assert_close(parts[""].mean, whole[""].mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[""].var, whole[""].var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("correction", [0, 1])
def test_correction_chooses_the_divisor(correction):
    x = torch.randn(10, 3)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x], correction=correction)
    torch.testing.assert_close(stats[""].var, x.double().var(0, correction=correction))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bits(method):
    model, data = trained(), uneven()
    a, b = (bnstats.measure_population_stats(model, data, method=method) for _ in range(2))
    for name in a:
        assert torch.equal(a[name].mean, b[name].mean)
        assert torch.equal(a[name].var, b[name].var)


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(2 * x + 1)

    x = torch.randn(20, 3)
    stats = bnstats.measure_population_stats(Twice(), x.split(5))["bn"]
    both = torch.cat([x, 2 * x + 1]).double()
    assert (stats.count, stats.num_batches) == (40, 4)
    np.testing.assert_allclose(stats.mean, both.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.var, both.var(0), rtol=1e-6)


def test_a_layer_never_called_is_named_and_left_alone():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    model.spare.running_mean.fill_(7)
    with pytest.warns(BnstatsWarning, match="'spare'"):
        result = bnstats.recompute_population_stats(model, [torch.randn(8, 3)])
    assert [*result.after] == ["used"]
    assert (model.spare.running_mean == 7).all()


def test_a_layer_that_only_some_batches_reach_counts_those():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.rare = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.rare(self.bn(x)) if x[0, 0] > 0 else self.bn(x)

    data = [torch.randn(6, 2).abs() * sign for sign in (1, -1, 1, -1, -1)]
    for method in METHODS:
        stats = bnstats.measure_population_stats(Sometimes(), data, method=method)
        assert (stats["bn"].num_batches, stats["rare"].num_batches) == (5, 2)
        assert stats["rare"].count == 12


def test_include_chooses_and_the_others_normalize_as_in_evaluation():
    model, data = trained(), uneven()
    before = snapshot(model)[0]
    result = bnstats.recompute_population_stats(
        model, data, include=lambda name, module: name == "5" and module.num_features == 3
    )
    assert [*result.after] == ["5"]
    for key in ("1.running_mean", "8.running_var"):
        assert torch.equal(model.state_dict()[key], before[key][1])
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        x = torch.cat([evaluated[:5](x) for x in data]).double()
    np.testing.assert_allclose(result.after["5"].mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_max_batches_reads_no_more_than_so_many():
    read = []

    def loader():
        for x in torch.randn(10, 4, 3):
            read.append(x)
            yield x

    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader(), max_batches=4)
    assert stats[""].num_batches == len(read) == 4


def test_progress_shows_a_bar_only_when_asked(capsys):
    data = [torch.randn(4, 3)] * 3
    bnstats.measure_population_stats(nn.BatchNorm1d(3), data)
    assert capsys.readouterr().err == ""
    bnstats.measure_population_stats(nn.BatchNorm1d(3), data, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_batches():
    # The state is a few float64 per channel: what is allocated between batches stays the same.
    counts, x = [], torch.randn(4, 3)
    values_alive = count_new_values()

    def forward(model, batch):
        model(x)
        if batch in (2, 7):  # to look at every object takes a second
            counts.append(values_alive())

    bnstats.measure_population_stats(nn.BatchNorm1d(3), range(8), forward=forward)
    assert counts[0] == counts[1]


def test_no_thread_is_left_behind():
    before = threading.active_count()
    bnstats.measure_population_stats(nn.BatchNorm1d(3), [torch.randn(4, 3)])
    assert threading.active_count() == before


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_batch_of_one_value_counts_for_the_averaged_mean_and_not_for_the_variance(position):
    data = [x * (i + 1) for i, x in enumerate(torch.randn(4, 6, 3, dtype=torch.float64))]
    data.insert(position, torch.randn(1, 3, dtype=torch.float64))
    model = nn.BatchNorm1d(3).double()
    stats = bnstats.measure_population_stats(model, data, method="batch_average")[""]
    with_var = [x for x in data if len(x) > 1]
    means = torch.stack([x.mean(0) for x in data])
    variances = torch.stack([x.var(0) for x in with_var])
    torch.testing.assert_close(stats.mean, means.mean(0))
    torch.testing.assert_close(stats.var, variances.mean(0))
    torch.testing.assert_close(stats.mean_stderr, means.std(0) / 5**0.5)
    torch.testing.assert_close(stats.var_stderr, variances.std(0) / 4**0.5)
    assert (stats.count, stats.num_batches) == (25, 5)

    # A moving average of the means of all batches, and one of the variances that there are.
    stats = bnstats.measure_population_stats(model, data, method="ema")[""]
    _, var = oracles.exponential(with_var, 0.1, debias=True, pooled=False)
    doubled = [torch.cat([x, x]) for x in data]
    mean, _ = oracles.exponential(doubled, 0.1, debias=True, pooled=False)
    np.testing.assert_allclose(stats.mean, mean)
    np.testing.assert_allclose(stats.var, var)
