"""Models on a second device, on two, and on streams of the caller's."""

import copy
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import bnstats
import cases
from bnstats.reduction import wide_dtype
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


each_method = pytest.mark.parametrize("method", METHODS)


@each_method
@pytest.mark.parametrize("tolerance", [None, 0.2])
def test_a_model_on_a_device_has_the_statistics_of_its_copy_on_cpu(device, method, tolerance):
    model, data = trained(), cases.batches((16, 2, 8, 8), 40, scale=0.5, shift=0)
    options = {"method": method, "tolerance": tolerance}
    expected = bnstats.measure_population_stats(model, data, **options)
    on_device = copy.deepcopy(model).to(device)
    result = bnstats.recompute_population_stats(on_device, data, **options)
    assert_close(result.after, expected)
    batches = {stats.num_batches for stats in result.after.values()}
    assert batches == {stats.num_batches for stats in expected.values()}
    assert (batches == {40}) == (tolerance is None)
    running = on_device[8].running_var
    assert running.device.type == device.type
    torch.testing.assert_close(running.cpu(), result.after["8"].var.float())


@each_method
def test_two_calls_give_the_same_bits_there(device, method):
    model, data = trained().to(device), uneven()
    first, second = (bnstats.measure_population_stats(model, data, method=method) for _ in range(2))
    for name in first:
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            assert torch.equal(getattr(first[name], field), getattr(second[name], field))


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_model_is_measured_there(device, method, dtype):
    model, data = trained().to(dtype), [x.to(dtype) for x in uneven()]
    expected = bnstats.measure_population_stats(model, data, method=method)
    stats = bnstats.measure_population_stats(copy.deepcopy(model).to(device), data, method=method)
    for name in expected:
        # bfloat16 rounds to 1/256, in each of the layers before.
        scale = expected[name].var.mean().item()
        for field in ("mean", "var"):
            mine, theirs = getattr(stats[name], field), getattr(expected[name], field)
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * scale**0.5)


@each_method
def test_under_autocast_a_model_is_measured_there(device, method):
    model, data = trained().to(device), uneven()
    seen = set()

    def forward(model, x):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            model(x)

    expected = bnstats.measure_population_stats(model, data, method=method)
    model[1].register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    stats = bnstats.measure_population_stats(model, data, method=method, forward=forward)
    assert seen == {torch.bfloat16}
    for name in expected:  # rounded to 1/256 in each of the layers before, and squared
        torch.testing.assert_close(stats[name].var, expected[name].var, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("halves", ["two devices", "half on CPU", "half on CPU, last"])
@pytest.mark.parametrize("tolerance", [None, 0.3])
@each_method
def test_a_model_over_two_devices_is_measured_on_both(device, method, halves, tolerance):
    torch.manual_seed(1)
    model = TwoDevices("cpu", "cpu")
    data = list(torch.randn(24, 16, 4))
    options = {"method": method, "tolerance": tolerance}
    expected = bnstats.measure_population_stats(model, data, **options)
    cpu, first = torch.device("cpu"), torch.device(device.type, 0)
    second = cpu if halves != "two devices" else another(first)
    pair = (second, first) if halves == "half on CPU" else (first, second)
    spread = TwoDevices(*pair)
    spread.load_state_dict(model.state_dict())
    assert_close(bnstats.measure_population_stats(spread, data, **options), expected)
    result = bnstats.recompute_population_stats(spread, data, **options)
    assert [x.running_var.device for x in (spread.first[1], spread.second[1])] == [*pair]
    result.undo()


def another(device):
    """A second device of the same kind."""
    if torch.accelerator.device_count() < 2:
        pytest.skip(f"needs two {device.type} devices")
    return torch.device(device.type, 1 - device.index)


@contextmanager
def streams_of_the_callers(devices):
    """Make a stream of its own current on each device, and let the first one be current."""
    before = [torch.accelerator.current_stream(device) for device in devices]
    streams = [torch.Stream(device) for device in devices]
    try:
        for stream in reversed(streams):
            torch.accelerator.set_stream(stream)
        assert torch.accelerator.current_device_index() == 0
        yield streams
        assert torch.accelerator.current_device_index() == 0
        assert [torch.accelerator.current_stream(device) for device in devices] == streams
    finally:
        for stream in reversed(before):
            torch.accelerator.set_stream(stream)


@each_method
def test_every_device_computes_on_the_callers_stream(substitute, method, substitute_module):
    devices = [torch.device("substitute", i) for i in (0, 1)]
    model = TwoDevices(*devices)
    with streams_of_the_callers(devices) as streams, substitute_module.counting() as counts:
        bnstats.measure_population_stats(model, list(torch.randn(4, 16, 4)), method=method)
    used = {key for key in counts.streams if key[0] >= 0}
    assert used == {(stream.device.index, stream.stream_id) for stream in streams}


@each_method
def test_on_a_stream_of_the_callers_the_statistics_are_the_same(device, method):
    model, data = trained().to(device), uneven()
    expected = bnstats.measure_population_stats(model, data, method=method)
    with streams_of_the_callers([torch.device(device.type, 0)]):
        stats = bnstats.measure_population_stats(model, data, method=method)
    assert_close(stats, expected)


WAITS = {"pooled": 1, "batch_average": 1, "ema": 1, "layerwise": 0, "sweeps": 1}
"""How often a forward may wait for the device: for the answer whether all of it is finite."""


@each_method
@pytest.mark.parametrize("depth", [2, 6])
def test_however_deep_a_model_is_a_forward_waits_once(substitute, substitute_module, method, depth):
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(depth)]).to(substitute)
    data = [torch.randn(8, 3).to(substitute) for _ in range(20)]
    wide_dtype(substitute)  # asks once for all
    waits, copies = [], []
    for batches in (data[:10], data):
        with substitute_module.counting() as counts:
            bnstats.measure_population_stats(model, batches, method=method)
        waits.append(sum(counts.waits.values()))
        copies.append(sum(counts.copies.values()))
    forwards = 10 * (depth if method == "sweeps" else 1)
    assert waits[1] - waits[0] == WAITS[method] * forwards
    assert copies[1] == copies[0]


@each_method
def test_measuring_a_model_on_cpu_asks_no_accelerator(substitute, substitute_module, method):
    model, data = trained(), uneven()
    with substitute_module.counting() as counts:
        bnstats.recompute_population_stats(model, data, method=method)
    assert not counts


def test_measuring_a_model_on_cpu_makes_no_cuda_context():
    """Forked children, such as a DataLoader's workers, could not use CUDA any more."""
    program = f"""
import torch, bnstats
def refuse(*_):
    raise AssertionError("CUDA was asked")
torch.cuda._lazy_init = refuse
for name in ("current_stream", "current_device_index", "set_stream", "is_available"):
    setattr(torch.accelerator, name, refuse)
model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
for convert in ("ema", "cumulative", "moving_average"):
    bnstats.convert_batchnorm(model, convert)(torch.randn(4, 3)).sum().backward()
for method in {METHODS}:
    data = torch.utils.data.DataLoader(torch.randn(32, 3), 8, num_workers=1)
    bnstats.recompute_population_stats(model, data, method=method)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_batches_that_leave_a_device_are_waited_for(substitute, substitute_module):
    data = [torch.randn(8, 3).to(substitute) for _ in range(3)]
    with substitute_module.counting() as counts:
        bnstats.measure_population_stats(nn.BatchNorm1d(3), data)
    assert counts["copy:d2h"] == 3
    assert counts["copy:d2h:nonblocking"] == 0
