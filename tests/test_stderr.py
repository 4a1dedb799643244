"""Standard errors in deep networks, against the spread over many repetitions."""

import pytest
import torch
from torch import nn

import bnstats

REPETITIONS = 150  # side by side, as groups of channels: one pass measures all of them
BATCHES = 24


def network():
    """The same network in every group: three layers, each after a linear map."""
    generator = torch.Generator().manual_seed(0)

    def linear(inputs, outputs):
        layer = nn.Conv1d(inputs * REPETITIONS, outputs * REPETITIONS, 1, groups=REPETITIONS)
        weight = torch.randn(outputs, inputs, 1, generator=generator) / inputs**0.5
        layer.weight.data = weight.repeat(REPETITIONS, 1, 1)
        layer.bias.data = torch.randn(outputs, generator=generator).repeat(REPETITIONS)
        return layer

    def norm():
        layer = nn.BatchNorm1d(8 * REPETITIONS)
        layer.weight.data = (0.5 + torch.rand(8, generator=generator)).repeat(REPETITIONS)
        layer.bias.data = torch.randn(8, generator=generator).repeat(REPETITIONS) / 3
        return layer

    return nn.Sequential(
        linear(6, 8), norm(), nn.ReLU(), linear(8, 8), norm(), nn.ReLU(), linear(8, 8), norm()
    ).double()


def alike(size, generator):
    return torch.randn(size, 6 * REPETITIONS, 1, generator=generator)


def of_different_scale_and_place(size, generator):
    x = alike(size, generator).view(size, REPETITIONS, 6)
    scale = 0.5 + torch.rand(1, REPETITIONS, 1, generator=generator)
    shift = 0.7 * torch.randn(1, REPETITIONS, 6, generator=generator)
    return (x * scale + shift).view(size, -1, 1)


def skewed(size, generator):
    return alike(size, generator).exp()


def data(draw, sizes=(16,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [draw(sizes[i % len(sizes)], generator).double() for i in range(BATCHES)]


def ratios(stats):
    """Reported over real errors of the mean and the variance, over all channels of a layer."""
    found = []
    for value, stderr in ((stats.mean, stats.mean_stderr), (stats.var, stats.var_stderr)):
        real = value.view(REPETITIONS, -1).var(0).mean().sqrt()
        found.append(float(stderr.square().mean().sqrt() / real))
    return found


@pytest.mark.parametrize("sizes", [(16,), (9, 24, 14)], ids=["even", "uneven"])
@pytest.mark.parametrize("draw", [alike, of_different_scale_and_place, skewed])
@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema"])
def test_the_reported_error_is_the_real_one_in_every_layer(method, draw, sizes):
    stats = bnstats.measure_population_stats(network(), data(draw, sizes), method=method)
    assert not stats.stderr_is_conditional
    for name, layer in stats.items():
        for ratio in ratios(layer):
            assert 0.8 < ratio < 1.25, (name, ratios(layer))


@pytest.mark.parametrize("method", ["layerwise", "sweeps"])
@pytest.mark.parametrize("draw", [alike, of_different_scale_and_place, skewed])
def test_of_the_fixed_point_it_is_the_real_one_given_the_earlier_layers(draw, method):
    # The earlier layers' statistics are those of much data, the same in every repetition.
    model = network()
    much = torch.cat(data(draw, sizes=(60,), seed=7)).view(-1, REPETITIONS, 6).flatten(0, 1)
    much = much[:2000].repeat(1, REPETITIONS)[:, :, None]
    bnstats.recompute_population_stats(model, much.split(500), method="layerwise")
    for measured in ("1", "4", "7"):
        stats = bnstats.measure_population_stats(
            model, data(draw), method=method, include=lambda name, _, one=measured: name == one
        )
        assert stats.stderr_is_conditional
        for ratio in ratios(stats[measured]):
            assert 0.8 < ratio < 1.25, (measured, ratios(stats[measured]))


@pytest.mark.parametrize("method", ["layerwise", "sweeps"])
def test_of_the_fixed_point_the_whole_error_is_smaller_than_reported_and_the_result_says_so(
    method,
):
    # Earlier statistics move with the sample, and take most of its errors out of later layers.
    result = bnstats.recompute_population_stats(network(), data(alike), method=method)
    first, *later = (ratios(layer) for layer in result.after.values())
    assert all(0.8 < ratio < 1.25 for ratio in first)
    for ratio in later:
        assert ratio[0] > 2
        assert ratio[1] > 1.25
    assert "standard errors are given the statistics of earlier layers" in str(result)
