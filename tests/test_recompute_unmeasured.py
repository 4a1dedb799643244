"""What a measurement says of what it cannot measure, or not write."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import BnstatsWarning, InvalidValueError
from networks import METHODS, assert_untouched, snapshot, trained, uneven

ALL_METHODS = [*METHODS, "layerwise", "sweeps"]


async def in_a_coroutine(model, batch):
    model(batch)


@pytest.mark.parametrize(
    ("forward", "remedy"),
    [
        (lambda model, batch: (model(x) for x in batch.chunk(2)), r"a generator.*list\("),
        (lambda model, batch: map(model, batch.chunk(2)), r"a map.*list\("),
        (in_a_coroutine, r"a coroutine.*asyncio\.run\("),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_that_returns_what_has_yet_to_run_is_told_so(forward, remedy, masked):
    mask = (lambda batch: torch.ones(len(batch), dtype=torch.bool)) if masked else None
    with pytest.warns(BnstatsWarning, match=f"no batch reached.*returned {remedy}"):
        stats = bnstats.measure_population_stats(trained(), uneven(), forward=forward, mask=mask)
    assert len(stats) == 0


def test_a_model_that_has_run_may_return_what_it_likes():
    def forward(model, batch):
        y = model(batch)
        return (x for x in y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnstats.measure_population_stats(trained(), uneven(), forward=forward)


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_layer_that_moves_its_channels_itself_is_left_alone_with_the_reason(method):
    model = nn.Sequential(ChannelsLast(3))
    with pytest.warns(BnstatsWarning, match=r"'0' \(ChannelsLast\).*\(8, 5, 3\).*3 channels"):
        stats = bnstats.measure_population_stats(model, [torch.randn(8, 5, 3)] * 2, method=method)
    assert len(stats) == 0


@pytest.mark.parametrize("method", ALL_METHODS)
def test_layers_that_share_their_statistics_are_refused_before_one_overwrites_the_others(method):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[2].running_mean = model[0].running_mean
    before = snapshot(model)
    data = torch.randn(40, 3).split(10)
    with pytest.raises(InvalidValueError, match=r"layers '0' and '2' share .* include"):
        bnstats.recompute_population_stats(model, data, method=method)
    assert_untouched(model, before)
    one = bnstats.recompute_population_stats(model, data, include=lambda name, _: name == "0")
    assert [*one.after] == ["0"]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_variance_beyond_a_half_buffer_is_warned_of_where_it_spoils_the_layers_behind(method):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).half()
    data = [(1000 * torch.randn(64, 3)).half() for _ in range(4)]
    with pytest.warns(BnstatsWarning, match=r"layer '0' has a variance .* 65504.*float\(\)"):
        bnstats.measure_population_stats(model, data, method=method)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_model_made_in_inference_mode_is_measured_and_written_to_only_there(method):
    with torch.inference_mode():
        model = trained()
    data = uneven()
    stats = bnstats.measure_population_stats(model, data, method=method)
    read = []

    def reading():
        read.append(1)
        yield from data

    for write in (
        lambda: bnstats.recompute_population_stats(model, reading(), method="pooled"),
        lambda: stats.apply_to(model),
    ):
        with pytest.raises(InvalidValueError, match=r"layer '1' .*inference_mode.*load"):
            write()
    assert not read
    with torch.inference_mode():
        stats.apply_to(model)
    torch.testing.assert_close(model[1].running_mean.double(), stats["1"].mean)


def test_numbers_of_numpy_are_numbers(tmp_path):
    stats = bnstats.measure_population_stats(
        trained(),
        uneven(),
        max_batches=np.int64(2),
        tolerance=np.float32(0.5),
        correction=np.int8(1),
    )
    assert stats["1"].num_batches == 2
    stats.save(tmp_path / "stats.npz")


def test_a_correction_that_is_no_whole_number_is_refused_before_it_cannot_be_saved():
    with pytest.raises(InvalidValueError, match=r"correction: .*1\.0"):
        bnstats.measure_population_stats(trained(), uneven(), correction=1.0)


class Pruned(nn.Module):
    """Has a layer that pruning has left no channel of."""

    def __init__(self, runs, axes):
        super().__init__()
        # With a weight torch itself cannot run it.
        self.pruned, self.bn = nn.BatchNorm1d(0, affine=not runs), nn.BatchNorm1d(3)
        self.runs, self.axes = runs, axes

    def forward(self, x):
        if self.runs:
            self.pruned(x.new_zeros(len(x), 0, *[2] * self.axes))
        return self.bn(x)


@pytest.mark.parametrize(("runs", "axes"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("include", [None, lambda *_: True])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_layer_without_channels_is_left_alone(method, include, runs, axes):
    model = Pruned(runs, axes)
    options = {"method": method, "include": include}
    result = bnstats.recompute_population_stats(model, list(torch.randn(3, 4, 3)), **options)
    assert {name: stats.count for name, stats in result.after.items()} == {"bn": 12}


def test_a_model_of_layers_without_channels_alone_is_told_so():
    with pytest.warns(BnstatsWarning, match="1 BatchNorm1d without channels"):
        bnstats.recompute_population_stats(nn.BatchNorm1d(0), [torch.randn(4, 0)])
