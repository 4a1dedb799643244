"""Standard errors that are the real errors, and stopping when they are small enough."""

from itertools import takewhile

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import BnstatsWarning, InvalidTypeError, InvalidValueError
from bnstats.recomputation.collector import batches_before_checks

METHODS = ["pooled", "batch_average", "ema"]
REPETITIONS = 200  # each one a channel, so that one pass simulates them all


def draw(batches, sizes, generator):
    """Batches whose mean and scale vary, independently in every channel."""
    for i in range(batches):
        shift = 0.7 * torch.randn(1, REPETITIONS, generator=generator)
        scale = 0.5 + torch.rand(1, REPETITIONS, generator=generator)
        noise = torch.randn(sizes[i % len(sizes)], REPETITIONS, generator=generator)
        yield (5 + shift + scale * noise).double()


def truth(method):
    within = 1 + 1 / 12  # the mean of a squared scale, uniform over 0.5 to 1.5
    return 5, within + 0.49 if method == "pooled" else within


def ratio(errors, stderr):
    return float(errors.square().mean().sqrt() / stderr.square().mean().sqrt())


def measure(loader, method="pooled", **options):
    model = nn.BatchNorm1d(REPETITIONS).double()
    return bnstats.measure_population_stats(model, loader, method=method, **options)[""]


@pytest.mark.parametrize("sizes", [[16], [4, 30, 9, 17, 40, 6, 23]], ids=["even", "uneven"])
@pytest.mark.parametrize("method", METHODS)
def test_the_real_error_is_the_reported_one(method, sizes):
    generator = torch.Generator().manual_seed(1)
    stats = measure(draw(60, sizes, generator), method)
    mean, var = truth(method)
    assert 0.8 < ratio(stats.mean - mean, stats.mean_stderr) < 1.25
    assert 0.8 < ratio(stats.var - var, stats.var_stderr) < 1.25


@pytest.mark.parametrize("batches", [20, 36])
@pytest.mark.parametrize("method", METHODS)
def test_of_a_finite_population_the_real_error_is_smaller_and_so_is_the_reported_one(
    method, batches
):
    generator = torch.Generator().manual_seed(2)
    population = list(draw(40, [5, 12, 20], generator))
    whole = measure(population, "batch_average" if method == "ema" else method)
    stats = measure(population, method, max_batches=batches)
    assert 0.8 < ratio(stats.mean - whole.mean, stats.mean_stderr) < 1.25
    assert 0.8 < ratio(stats.var - whole.var, stats.var_stderr) < 1.25
    of_a_source = measure(iter(population), method, max_batches=batches)
    assert (of_a_source.mean_stderr > stats.mean_stderr).all()


def test_about_zero_the_error_of_the_mean_square_is_the_real_one():
    class AboutZero(nn.BatchNorm1d):
        def statistics_about_zero(self):
            return True

    generator = torch.Generator().manual_seed(3)
    model = AboutZero(REPETITIONS).double()
    stats = bnstats.measure_population_stats(model, draw(60, [8, 20], generator))[""]
    assert (stats.mean_stderr == 0).all()
    assert 0.8 < ratio(stats.var - (25 + sum(truth("pooled")) - 5), stats.var_stderr) < 1.25


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_are_small_enough_on_stopping_and_no_batch_is_read_in_vain(method):
    generator = torch.Generator().manual_seed(4)
    read = []

    def loader(batches=2000):
        for x in draw(batches, [16], generator):
            read.append(x)
            yield x

    tolerance = {"pooled": 0.1, "batch_average": 0.1, "ema": 0.25}[method]
    stats = measure(loader(), method, tolerance=tolerance)
    assert stats.num_batches == len(read)
    reported = [stats.mean_stderr / stats.var.sqrt(), stats.var_stderr / stats.var]
    assert max(float(e.square().mean().sqrt()) for e in reported) <= tolerance
    check_before = max(takewhile(lambda check: check < len(read), batches_before_checks(tolerance)))
    assert len(read) - check_before <= max(4, len(read) // 8)
    before = measure(iter(read), method, max_batches=check_before)
    reported = [before.mean_stderr / before.var.sqrt(), before.var_stderr / before.var]
    assert max(float(e.square().mean().sqrt()) for e in reported) > tolerance
    mean, var = truth(method)
    assert ratio(stats.mean - mean, stats.var.sqrt()) < 1.25 * tolerance
    assert ratio(stats.var - var, stats.var) < 1.25 * tolerance


def test_every_layer_has_to_be_sure():
    torch.manual_seed(0)

    class Drifting(nn.Module):
        """Adds to each batch an offset of its own: the second layer's mean is unsure."""

        def __init__(self):
            super().__init__()
            self.offset = iter(torch.randn(1000))

        def forward(self, x):
            return x + next(self.offset)

    def read(model, tolerance=0.1):
        loader = (torch.randn(64, 4) for _ in range(500))
        stats = bnstats.measure_population_stats(model, loader, tolerance=tolerance)
        return {s.num_batches for s in stats.values()}

    assert read(nn.Sequential(nn.BatchNorm1d(4))) == {8}
    (both,) = read(nn.Sequential(nn.BatchNorm1d(4), Drifting(), nn.BatchNorm1d(4)))
    assert 30 < both < 200


def test_a_tolerance_out_of_reach_reads_everything():
    data = torch.randn(40, 16, 3)
    assert measure_3(data, tolerance=1e-9).num_batches == 40


def measure_3(data, **options):
    return bnstats.measure_population_stats(nn.BatchNorm1d(3), list(data), **options)[""]


def test_channels_without_variance_are_sure():
    # 0 / 0 is no reason to read on, nor is what float32 makes of a constant.
    data = torch.randn(100, 64, 3)
    data[..., 0] = 0
    data[..., 1] = 1e3
    data[::2, ::3, 1] = torch.nextafter(torch.tensor(1e3), torch.tensor(2e3))
    stats = measure_3(data, tolerance=0.2)
    assert stats.num_batches == 8
    assert stats.mean_stderr.isfinite().all()


def test_errors_are_measured_in_what_evaluation_divides_by():
    # A deviation of 1e-4 is a thirtieth of what eps adds; without eps it is all there is.
    data = 1e-4 * torch.randn(40, 4, 3)

    def read(eps):
        layer = nn.BatchNorm1d(3, eps=eps)
        return bnstats.measure_population_stats(layer, list(data), tolerance=0.05)[""].num_batches

    assert read(1e-5) == 8
    assert read(0.0) > 30


def test_a_layer_seen_in_one_batch_is_not_sure_and_one_never_seen_does_not_matter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.bn, self.rare, self.spare = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x):
            self.calls += 1
            x = self.bn(x)
            return self.rare(x) if self.calls in (1, 12) else x

    with pytest.warns(BnstatsWarning, match="'spare'"):
        stats = bnstats.measure_population_stats(Model(), list(torch.randn(40, 99, 3)), tolerance=2)
    assert stats["bn"].num_batches == 12


def test_stopping_is_the_same_for_the_same_call():
    data = list(torch.randn(90, 16, 3).cumsum(0))
    a, b = (measure_3(data, tolerance=0.3) for _ in range(2))
    assert a.num_batches == b.num_batches
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.var_stderr, b.var_stderr)


def test_skipped_batches_are_no_part_of_the_errors():
    data = list(torch.randn(20, 16, 3))
    bad = torch.full_like(data[0], torch.nan)
    stats = measure_3([bad, *data[:10], bad, *data[10:]], on_nonfinite="skip")
    np.testing.assert_array_equal(stats.mean_stderr, measure_3(data).mean_stderr)


@pytest.mark.parametrize(
    ("tolerance", "error", "says"),
    [
        (0, InvalidValueError, "expected a positive number.*got 0"),
        (-0.1, InvalidValueError, "got -0.1"),
        (float("nan"), InvalidValueError, "got nan"),
        ("0.1", InvalidTypeError, "expected a number or None, got str"),
        (True, InvalidTypeError, "got bool"),
    ],
)
def test_a_tolerance_that_is_none_says_so(tolerance, error, says):
    with pytest.raises(error, match=says):
        measure_3(torch.randn(3, 4, 3), tolerance=tolerance)


@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_a_loader_that_begins_with_bad_batches_is_read_on(method):
    # Where no layer was reached yet, all layers were found to be sure.
    bad, good = [torch.full((4, 3), torch.nan)] * 9, list(torch.randn(20, 64, 3))
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3), bad + good, method=method, tolerance=0.1, on_nonfinite="skip"
    )
    assert stats[""].num_batches >= 2
    assert stats.num_skipped == 9
