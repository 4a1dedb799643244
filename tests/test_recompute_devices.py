"""Models on a second device, on two, and on streams of the caller's."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from networks import trained, uneven

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


class TwoDevices(nn.Module):
    """The first half on one device, the second on another."""

    def __init__(self, first, second):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).to(first)
        self.second = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(second)
        self.between = second

    def forward(self, x):
        return self.second(self.first(x).to(self.between))


def assert_close(stats, expected):
    assert stats.keys() == expected.keys()
    for name in expected:
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            mine = getattr(stats[name], field)
            assert mine.device.type == "cpu"
            torch.testing.assert_close(mine, getattr(expected[name], field), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_a_device_has_the_statistics_of_its_copy_on_cpu(substitute, method):
    model, data = trained(), uneven()
    expected = bnstats.measure_population_stats(model, data, method=method)
    on_device = copy.deepcopy(model).to(substitute)
    result = bnstats.recompute_population_stats(on_device, data, method=method)
    assert_close(result.after, expected)
    torch.testing.assert_close(on_device[8].running_var.cpu(), expected["8"].var.float())


@pytest.mark.parametrize("halves", [("substitute:0", "substitute:1"), ("cpu", "substitute:1")])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_over_two_devices_is_measured_on_both(substitute, method, halves):
    torch.manual_seed(1)
    model = TwoDevices("cpu", "cpu")
    data = list(torch.randn(5, 16, 4))
    expected = bnstats.measure_population_stats(model, data, method=method)
    spread = TwoDevices(*map(torch.device, halves))
    spread.load_state_dict(model.state_dict())
    assert_close(bnstats.measure_population_stats(spread, data, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_device_computes_on_the_callers_stream(substitute, method, substitute_module):
    devices = [torch.device("substitute", i) for i in (0, 1)]
    model = TwoDevices(*devices)
    before = [torch.accelerator.current_stream(device) for device in devices]
    streams = [torch.Stream(device) for device in devices]
    try:
        for stream in reversed(streams):
            torch.accelerator.set_stream(stream)
        assert torch.accelerator.current_device_index() == 0
        with substitute_module.counting() as counts:
            bnstats.measure_population_stats(model, list(torch.randn(4, 16, 4)), method=method)
        assert torch.accelerator.current_device_index() == 0
    finally:
        for stream in reversed(before):
            torch.accelerator.set_stream(stream)
    used = {key for key in counts.streams if key[0] >= 0}
    assert used == {(stream.device.index, stream.stream_id) for stream in streams}


def test_threads_of_a_model_on_cpu_ask_no_accelerator_for_anything(monkeypatch):
    def refuse(*_):
        raise AssertionError("a CPU model needs no accelerator")

    for name in ("current_stream", "current_device_index", "set_stream", "is_available"):
        monkeypatch.setattr(torch.accelerator, name, refuse)
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3), [torch.randn(4, 3)] * 2, method="layerwise"
    )
    assert stats[""].count == 8


def test_batches_that_leave_a_device_are_waited_for(substitute, substitute_module):
    data = [torch.randn(8, 3).to(substitute) for _ in range(3)]
    with substitute_module.counting() as counts:
        bnstats.measure_population_stats(nn.BatchNorm1d(3), data)
    assert counts["copy:d2h"] == 3
    assert counts["copy:d2h:nonblocking"] == 0
