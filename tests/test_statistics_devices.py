"""Moments, statistics and records of what is on a second device."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import oracles
from bnstats import Moments
from bnstats import moments as core
from bnstats.errors import NonFiniteStatisticsError
from cases import FAMILIES
from networks import assert_untouched, snapshot, trained, uneven


def mixed(count=4):
    return [torch.randn(6, 3, 4) * (1 + i) + 5 * i for i in range(count)]


def assert_same_moments(mine, expected, tolerance=1e-6):
    assert torch.equal(mine.count.cpu(), expected.count)
    for name in ("mean", "m2"):
        a, b = getattr(mine, name), getattr(expected, name)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_moments_of_a_batch_merge_where_they_are(device, dtype):
    batches = [x.to(dtype) for x in mixed()]
    here, there = Moments.empty(3, device="cpu"), Moments.empty(3, device=device)
    for x in batches:
        here, there = here + Moments.from_batch(x), there + Moments.from_batch(x.to(device))
        assert there.mean.device.type == there.var().device.type == device.type
        assert_same_moments(there, here)
        torch.testing.assert_close(there.var().cpu(), here.var(), rtol=1e-6, atol=1e-6)


def test_moments_of_masked_values_are_those_on_cpu(device):
    x, mask = torch.randn(6, 3, 4), torch.rand(6, 4) < 0.5
    there = Moments.from_batch(x.to(device), mask=mask.to(device))
    assert_same_moments(there, Moments.from_batch(x, mask=mask))


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_moments_far_from_zero_have_float64s_precision(device, ratio):
    x = torch.randn(64, 3, 16, 16) + ratio
    mean, var = oracles.mean_var([x])
    there = Moments.from_batch(x.to(device))
    np.testing.assert_allclose(there.mean.cpu(), mean, rtol=1e-14)
    np.testing.assert_allclose(there.var().cpu(), var, rtol=1e-9)


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_far_from_zero_a_measured_mean_is_as_good_as_a_float32_buffer_holds_it(device, ratio):
    data = [torch.randn(64, 3, 16, 16) + ratio for _ in range(4)]
    mean, var = oracles.mean_var(data)
    stats = bnstats.measure_population_stats(nn.BatchNorm2d(3).to(device), data)[""]
    rounding = torch.finfo(torch.float32).eps * ratio
    np.testing.assert_allclose(stats.mean, mean, rtol=0, atol=2 * rounding)
    np.testing.assert_allclose(stats.var, var, rtol=1e-3)


def test_moments_are_added_up_in_float64_on_a_device_that_has_it(device, monkeypatch):
    # The kernels behind the substitute add up float32 in float64 anyway; CUDA's do not.
    seen, reduce = [], core.mean_and_m2
    monkeypatch.setattr(core, "mean_and_m2", lambda x: (seen.append(x.dtype), reduce(x))[1])
    Moments.from_batch(torch.randn(4, 3).to(device))
    assert seen == [torch.float64]


def test_a_layer_called_twice_in_a_forward_pools_both_calls(device):
    norm = nn.BatchNorm1d(3)
    data = list(torch.randn(4, 8, 3))

    def forward(model, x):
        model(model(x) + x)

    expected = bnstats.measure_population_stats(norm, data, forward=forward)
    stats = bnstats.measure_population_stats(norm.to(device), data, forward=forward)
    assert stats[""].count == expected[""].count == 64
    torch.testing.assert_close(stats[""].mean, expected[""].mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[""].var, expected[""].var, rtol=1e-5, atol=1e-6)


@pytest.fixture
def both(device):
    """A model on CPU, and its copy on the device."""
    model = trained()
    return model, copy.deepcopy(model).to(device)


def assert_close_stats(stats, expected):
    assert stats.keys() == expected.keys()
    for name in expected:
        for field in ("mean", "var", "mean_stderr", "var_stderr", "mean_var_cov", "spread"):
            mine, theirs = getattr(stats[name], field), getattr(expected[name], field)
            assert (mine.device.type, mine.dtype) == ("cpu", torch.float64)
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * max(scale, 1))


def test_statistics_measured_on_different_devices_merge(both):
    here, there = both
    data = uneven()

    def merged(first, second):
        first = bnstats.measure_population_stats(first, data[:2])
        return first.merge(bnstats.measure_population_stats(second, data[2:]))

    assert_close_stats(merged(here, there), merged(here, here))
    assert_close_stats(merged(there, here), merged(here, here))


def test_statistics_of_a_device_are_saved_and_applied_anywhere(both, tmp_path):
    here, there = both
    bnstats.measure_population_stats(there, uneven()).save(tmp_path / "stats.npz")
    stats = bnstats.PopulationStats.load(tmp_path / "stats.npz")
    for model in both:
        drift = stats.drift_from(model)
        assert all(x.device.type == "cpu" for layer in drift.values() for x in layer)
        stats.apply_to(model)
        for name in stats:
            running = model.get_submodule(name).running_var
            torch.testing.assert_close(running.cpu(), stats[name].var.float())
    for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True):
        assert torch.equal(a, b.cpu())


def test_a_recalibration_is_printed_and_undone_there(both, device):
    here, there = both
    data = uneven()
    results = [bnstats.recompute_population_stats(model, data) for model in both]
    tables = [str(result).splitlines() for result in results]
    assert tables[0][0] == tables[1][0]
    assert [row.split()[:3] for row in tables[0]] == [row.split()[:3] for row in tables[1]]
    assert results[0].worst_first() == results[1].worst_first()
    after = there[1].running_var.cpu()
    for result in results:
        result.undo()
    for key, value in there.state_dict().items():
        assert value.device.type == device.type
        torch.testing.assert_close(value.cpu(), here.state_dict()[key])
    assert not torch.equal(after, there[1].running_var.cpu())


def test_a_failure_there_leaves_the_model_as_it_was(both):
    _, there = both
    before = snapshot(there)
    data = [*uneven(), torch.full((2, 2, 8, 8), torch.nan)]
    for method in ("pooled", "layerwise", "sweeps"):
        with pytest.raises(NonFiniteStatisticsError, match="batch 4 "):
            bnstats.recompute_population_stats(there, data, method=method)
        assert_untouched(there, before)
        skipped = bnstats.measure_population_stats(there, data, method=method, on_nonfinite="skip")
        assert skipped.num_skipped == 1


def test_a_device_out_of_memory_leaves_the_model_as_it_was(substitute, substitute_module):
    model = trained().to(substitute)
    before = snapshot(model)

    def forward(model, x):
        with substitute_module.without_memory():
            model(x)

    for method in ("pooled", "layerwise", "sweeps"):
        with pytest.raises(torch.OutOfMemoryError):
            bnstats.recompute_population_stats(model, uneven(), method=method, forward=forward)
        assert_untouched(model, before)


def train(model, x, run):
    x = x.to(next(model.parameters()).device).requires_grad_()
    run(model, x).square().mean().backward()


RUNS = {
    "plain": lambda model, x: model(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
}


def network(family):
    norm = nn.BatchNorm2d(4) if family is None else family.make(2, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("family", [None, *FAMILIES], ids=lambda f: f.name if f else "torch's")
def test_batch_statistics_are_recorded_there(device, family, run):
    here = network(family)
    there = copy.deepcopy(here).to(device)
    data = torch.randn(6, 4, 3, 5, 6)
    records = []
    for model in (here, there):
        with bnstats.record_batch_stats(model) as record:
            for x in data:
                train(model, x, run)
        records.append(record["1"])
    for field in ("mean", "var", "g", "psi"):
        mine, expected = (getattr(record, field) for record in records)
        assert (mine.device.type, mine.dtype, mine.shape) == ("cpu", torch.float64, (6, 4))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_records_and_recalibrations_of_a_device_are_plotted(both):
    pytest.importorskip("matplotlib").use("agg")
    _, there = both
    with bnstats.record_batch_stats(there, ["1"]) as record:
        for x in uneven():
            train(there, x, RUNS["plain"])
    assert bnstats.plot_batch_stats(record, "1")
    assert bnstats.plot_drift(bnstats.recompute_population_stats(there, uneven()))
