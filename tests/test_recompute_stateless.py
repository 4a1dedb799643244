"""Models whose forward replaces their tensors, differentiates through them, or has threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bnstats
from bnstats.errors import InvalidValueError
from networks import METHODS, assert_untouched, snapshot, trained, uneven

ALL_METHODS = [*METHODS, "layerwise", "sweeps"]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_buffers_that_a_forward_brings_are_refused_and_never_written_to(method):
    # A state dict shares its memory with the model: what was written to it stayed there.
    model = trained()
    state, before = model.state_dict(), snapshot(model)

    def forward(model, batch):
        return functional_call(model, state, (batch,))

    with pytest.raises(InvalidValueError, match=r"layer '1' .*without the buffers"):
        bnstats.recompute_population_stats(model, uneven(), method=method, forward=forward)
    assert_untouched(model, before)


def with_other_parameters(model, batch):
    return functional_call(model, {k: x * 1.5 for k, x in model.named_parameters()}, (batch,))


@pytest.mark.parametrize("method", [*METHODS, "sweeps"])
def test_parameters_that_a_forward_brings_are_the_layers(method):
    model, data = trained(), uneven()
    before = snapshot(model)
    stats = bnstats.measure_population_stats(
        model, data, method=method, forward=with_other_parameters
    )
    assert_untouched(model, before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    expected = bnstats.measure_population_stats(model, data, method=method)
    for name, layer in expected.items():
        assert torch.equal(stats[name].mean, layer.mean)


def test_forwards_side_by_side_that_replace_parameters_are_refused_and_all_are_put_back():
    # Of two such forwards the one that ended last left the other's in the model.
    model = trained()
    before = snapshot(model)
    with pytest.raises(InvalidValueError, match=r"layer '1'.*use method=\"sweeps\""):
        bnstats.measure_population_stats(
            model, uneven(), method="layerwise", forward=with_other_parameters
        )
    assert_untouched(model, before)


@pytest.mark.parametrize("names", [["0.weight"], ["2.bias"], ["0.weight", "0.bias", "2.weight"]])
@pytest.mark.parametrize("affine", [False, True])
def test_so_are_forwards_that_replace_parameters_of_other_layers(names, affine):
    # Batches that waited at the layer went on with what a later one had put in.
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=affine), nn.Linear(3, 2))
    before = snapshot(model)
    parameters = [*model.parameters()]

    def forward(model, batch):
        own = dict(model.named_parameters())
        return functional_call(model, {name: own[name] * 1.5 for name in names}, (batch,))

    with pytest.raises(InvalidValueError, match=r"layer '1'.*use method=\"sweeps\""):
        bnstats.measure_population_stats(
            model, torch.randn(64, 3).split(8), method="layerwise", forward=forward
        )
    assert_untouched(model, before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_forwards_side_by_side_that_replace_buffers_leave_the_models_own():
    # Each put back what it had found, which was another one's.
    model = trained()
    before = snapshot(model)

    def forward(model, batch):
        found = model[1].num_batches_tracked
        model[1].num_batches_tracked = found.clone()
        model(batch)
        model[1].num_batches_tracked = found

    bnstats.measure_population_stats(model, uneven(), method="layerwise", forward=forward)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["0.scale", "2.scale"])
def test_so_are_forwards_that_replace_buffers_of_other_layers(name):
    # Batches that waited at the layer went on with the latest one's.
    model = nn.Sequential(Scale(), nn.BatchNorm1d(3), Scale(), nn.BatchNorm1d(3))
    before = snapshot(model)
    scales = iter(range(1, 9))

    def forward(model, batch):
        return functional_call(model, {name: torch.tensor(float(next(scales)) + 1)}, (batch,))

    with pytest.raises(InvalidValueError, match=r"layer '1'.*buffers.*use method=\"sweeps\""):
        bnstats.measure_population_stats(
            model, torch.randn(64, 3).split(8), method="layerwise", forward=forward
        )
    assert_untouched(model, before)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return x * self.scale


class GrowingCache(nn.Module):
    """Counts forwards, and has a buffer as long as the longest input so far, as encodings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.zeros(0))
        self.register_buffer("calls", torch.tensor(0))
        self.longest = 0

    def forward(self, x):
        self.calls = self.calls + 1
        if x.shape[-1] > self.longest:
            self.longest = x.shape[-1]
            self.positions = torch.arange(float(self.longest))
        return x + self.positions[: x.shape[-1]]


# Of several threads one could count over another: what the model does is not atomic.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_buffer_that_the_model_replaces_for_good_stays_so(method):
    model = nn.Sequential(GrowingCache(), nn.BatchNorm1d(3))
    batches = [torch.randn(4, 3, length) for length in (5, 7, 9)]
    bnstats.recompute_population_stats(model, batches, method=method)
    assert len(model[0].positions) == 9
    assert model[0].calls >= 3
    model.eval()(batches[0])


def test_buffers_that_nothing_replaces_are_not_read():
    # What is on the meta device has no values to compare.
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].register_buffer("unused", torch.zeros(2, device="meta"))
    stats = bnstats.measure_population_stats(model, [torch.randn(8, 3)], method="layerwise")
    assert stats["1"].count == 8


class InputGradients(nn.Module):
    """Two calls of a network, and the gradient of both: an energy model, a penalty on gradients."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4))

    def forward(self, x):
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), (2 * x).detach().requires_grad_()
            energy = self.net(x).square().sum() + self.net(y).square().sum()
            return torch.autograd.grad(energy, [x, y])


@pytest.mark.parametrize("method", ["pooled", "batch_average", "sweeps"])
def test_a_model_that_differentiates_through_two_calls_of_a_layer_serves(method):
    model = InputGradients()
    before = snapshot(model)
    x = torch.randn(40, 3)
    stats = bnstats.measure_population_stats(model, x.split(10), method=method)
    both = model.net[0](torch.cat([x, 2 * x])).double()
    torch.testing.assert_close(stats["net.1"].mean, both.mean(0), atol=1e-6, rtol=1e-6)
    assert_untouched(model, before)


class InThreads(nn.Module):
    """Runs parts of a batch in two threads at the same time."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        both = threading.Barrier(2, timeout=30)

        def run(layer, part):
            both.wait()
            return layer(part)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, self.layers, x.chunk(2)))


@pytest.mark.parametrize("method", [*METHODS, "sweeps"])
def test_a_layer_in_two_threads_of_one_forward_is_refused_and_not_measured_wrong(method):
    # One thread wrote what the layer normalizes with, and the other normalized with it.
    layer = nn.BatchNorm1d(3)
    model = InThreads(layer, layer)
    before = snapshot(model)
    with pytest.raises(InvalidValueError, match=r"layer 'layers\.0' runs in several threads"):
        bnstats.measure_population_stats(model, torch.randn(40, 3).split(10), method=method)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", [*METHODS, "sweeps"])
def test_layers_in_threads_of_their_own_serve(method):
    model, batches = InThreads(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), torch.randn(4, 10, 3)
    stats = bnstats.measure_population_stats(model, list(batches), method=method)
    for name, part in zip(stats, batches.chunk(2, dim=1), strict=True):
        own = bnstats.measure_population_stats(nn.BatchNorm1d(3), list(part), method=method)[""]
        torch.testing.assert_close(stats[name].mean, own.mean)
