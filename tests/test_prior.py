"""Statistics of few samples of other data, drawn toward those of the training data."""

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import networks
from bnstats import BnstatsWarning, PopulationStats
from bnstats.errors import InvalidTypeError, InvalidValueError, LayerMismatchError

EPS = 1e-5


def conv_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
    )


def images(count, shift=0.0, scale=1.0):
    """Images of correlated positions: each has a level and a contrast of its own."""
    level = torch.randn(count, 2, 1, 1)
    contrast = torch.rand(count, 2, 1, 1) + 0.5
    return shift + scale * (level + contrast * torch.randn(count, 2, 8, 8))


def moments_of_samples(x):
    """Each sample's mean, and mean square about the mean of all, of shape (N, C), float64."""
    x = x.double().flatten(2).numpy()
    return x.mean(2), ((x - x.mean((0, 2))[:, None]) ** 2).mean(2)


def definition(source, x):
    """The statistics of one layer, from the formulas; x is the loader's whole input."""
    k, square = len(x), source.var.numpy() + EPS
    covariance = source.sample_covariance.numpy()
    of_mean, of_var = covariance[:, 0, 0] / square, covariance[:, 1, 1] / square**2
    means, squares = moments_of_samples(x)
    mean = means.mean(0)
    scale = own = 1.0
    if k > 1:
        own = (means.var(0, ddof=1) / square).mean() / of_mean.mean()
        scale = (1 + (k - 1) * own) / k
    var = squares.mean(0) + scale * of_mean * square / k
    error = max(scale, 1) * of_mean / k
    shift = (mean - source.mean.numpy()) / square**0.5
    moved = max((shift**2 - error).mean(), 0)
    mean_weight = moved / (moved + error.mean())

    if k > 1:
        own = (squares.var(0, ddof=1) / (var + EPS) ** 2).mean() / of_var.mean()
        scale = (1 + (k - 1) * own) / k
    error = max(scale, 1) * of_var / k
    log_ratio = np.log((var + EPS) / square)
    moved = max((log_ratio**2 - error).mean(), 0)
    var_weight = moved / (moved + error.mean())
    return (
        source.mean.numpy() + mean_weight * (mean - source.mean.numpy()),
        square * np.exp(var_weight * log_ratio) - EPS,
        mean_weight,
        var_weight,
    )


def source_of(model, count=200, **options):
    return bnstats.measure_population_stats(model, images(count).split(50), **options)


@pytest.mark.parametrize("batch", [1, 8, 13])
def test_the_spread_between_samples_is_that_of_their_means_and_mean_squares(batch):
    x = images(40) * 3 + 100
    stats = bnstats.measure_population_stats(nn.BatchNorm2d(2), x.split(batch))[""]
    means, squares = moments_of_samples(x)
    expected = [np.cov(means[:, c], squares[:, c]) for c in range(2)]
    assert stats.num_samples == 40
    np.testing.assert_allclose(stats.sample_covariance, expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
@pytest.mark.parametrize("batch", [1, 13])
def test_the_spread_between_samples_is_right_for_data_far_from_the_running_mean(method, batch):
    # Squares about a mean 30,000 standard deviations away have no digit left of their spread.
    x = images(40) + 30_000
    batches = [x[:0], *x.split(batch), x[:0]]
    stats = bnstats.measure_population_stats(nn.BatchNorm2d(2), batches, method=method)[""]
    means, squares = moments_of_samples(x)
    expected = [np.cov(means[:, c], squares[:, c]) for c in range(2)]
    assert stats.num_samples == 40
    np.testing.assert_allclose(stats.sample_covariance, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64, 3),
        torch.randn(16, 3, 7),
        torch.randn(16, 3, 1, 1),
        torch.randn(16, 3, 2, 3).to(memory_format=torch.channels_last),
        torch.randn(16, 3, 64, 64).half(),
        torch.randn(2, 3, 4, 37, 41),
        torch.randn(16, 3, 9, 9) * 1e-3 + 1e3,
    ],
    ids=lambda x: f"{tuple(x.shape)}",
)
def test_measuring_the_samples_along_changes_no_statistic(x):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()](3)
    loader = x.split(8)
    plain = bnstats.recompute_population_stats(layer, loader).after[""]
    taken = bnstats.measure_population_stats(layer, loader)[""]
    assert (plain.num_samples, taken.num_samples) == (0, len(x))
    assert plain.count == taken.count
    scale = plain.var.sqrt()
    assert ((plain.mean - taken.mean) / scale).abs().max() < 1e-5
    assert (taken.var / plain.var - 1).abs().max() < 1e-5
    assert taken.sample_covariance.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("moved", [{}, {"shift": 0.7}, {"scale": 0.4}, {"shift": -1, "scale": 3}])
def test_weights_and_statistics_are_the_definitions(k, moved):
    layer = nn.BatchNorm2d(2)
    source = source_of(layer)
    x = images(k, **moved)
    result = bnstats.recompute_population_stats(layer, [x], prior=source).after[""]
    mean, var, mean_weight, var_weight = definition(source[""], x)
    assert result.mean_weight == pytest.approx(mean_weight, abs=1e-4)
    assert result.var_weight == pytest.approx(var_weight, abs=1e-4)
    np.testing.assert_allclose(result.mean, mean, atol=1e-4)
    np.testing.assert_allclose(result.var, var, rtol=1e-4)
    assert (layer.running_mean - result.mean).abs().max() < 1e-6


def test_many_samples_are_taken_as_they_are_and_the_same_data_leave_the_source():
    layer = nn.BatchNorm2d(2)
    source = source_of(layer, 4000)
    far = bnstats.recompute_population_stats(layer, images(400, 1.0, 2.0).split(50), prior=source)
    assert min(far.after[""].mean_weight, far.after[""].var_weight) > 0.98
    # A weight is random; that of data like the source's has its mass near 0.
    weights = [
        bnstats.measure_population_stats(layer, [images(4)], prior=source)[""].mean_weight
        for _ in range(40)
    ]
    assert np.median(weights) < 0.35


def test_the_statistics_are_nearer_to_the_datas_own_than_either_part():
    layer = nn.BatchNorm2d(2)
    source, moved = source_of(layer, 2000), {"shift": 0.5, "scale": 1.5}
    truth = bnstats.measure_population_stats(layer, images(2000, **moved).split(50))[""]

    def error(stats):
        square = ((stats.mean - truth.mean) ** 2 / truth.var).mean()
        return float(square + (stats.var / truth.var).log().square().mean())

    ours, target = 0.0, 0.0
    for _ in range(60):
        loader = [images(2, **moved)]
        ours += error(bnstats.measure_population_stats(layer, loader, prior=source)[""]) / 60
        target += error(bnstats.measure_population_stats(layer, loader)[""]) / 60
    assert ours < min(target, error(source[""]))


def test_each_layer_is_measured_behind_adapted_ones():
    model = conv_net()
    source = source_of(model)
    x = images(6, 0.8, 2.0)
    bnstats.recompute_population_stats(model, x.split(2), prior=source)
    with torch.no_grad():
        first, second = model[0](x), model[3](model[2](model[1].eval()(model[0](x))))
    for name, inputs in (("1", first), ("4", second)):
        mean, var, *_ = definition(source[name], inputs)
        np.testing.assert_allclose(model.get_submodule(name).running_mean, mean, atol=1e-4)
        np.testing.assert_allclose(model.get_submodule(name).running_var, var, rtol=2e-4)


def test_sweeps_end_where_layerwise_does():
    model = conv_net()
    source = source_of(model)
    loader = images(6, 0.8, 2.0).split(2)
    layerwise = bnstats.measure_population_stats(model, loader, prior=source)
    sweeps = bnstats.measure_population_stats(model, loader, prior=source, method="sweeps")
    assert layerwise.method == "layerwise"
    for name in source:
        np.testing.assert_allclose(layerwise[name].mean, sweeps[name].mean, atol=1e-5)
        np.testing.assert_allclose(layerwise[name].var, sweeps[name].var, rtol=1e-5)
        assert layerwise[name].mean_weight == pytest.approx(sweeps[name].mean_weight, abs=1e-5)


def test_one_value_per_channel_leaves_the_source():
    layer = nn.BatchNorm1d(4)
    source = bnstats.measure_population_stats(layer, torch.randn(100, 4).split(10))
    result = bnstats.recompute_population_stats(layer, [torch.full((1, 4), 9.0)], prior=source)
    assert torch.equal(result.after[""].mean, source[""].mean)
    assert torch.equal(result.after[""].var, source[""].var)


def test_dead_channels_stay_finite():
    layer = nn.BatchNorm2d(2)
    x = images(20)
    x[:, 0] = 3.0
    source = bnstats.measure_population_stats(layer, [x])
    for target in (images(3), torch.full((3, 2, 8, 8), 3.0)):
        result = bnstats.measure_population_stats(layer, [target], prior=source)[""]
        assert result.mean.isfinite().all()
        assert (result.var >= 0).all()
        assert (result.mean_stderr >= 0).all()


def test_layers_about_zero_keep_their_mean():
    layer = bnstats.MovingAverageBatchNorm2d(2)
    source = bnstats.measure_population_stats(layer, images(100).split(20))
    result = bnstats.recompute_population_stats(layer, [images(3, 0, 3.0)], prior=source)
    assert (layer.running_mean == 0).all()
    assert result.after[""].var_weight > 0.5


def test_padding_counts_for_nothing():
    x, layer = images(12), nn.BatchNorm2d(2)
    valid = torch.zeros(12, 8, 8, dtype=torch.bool)
    for i in range(12):
        valid[i, : 1 + i % 8, : 8 - i % 5] = True
    samples = [x[i : i + 1, :, : 1 + i % 8, : 8 - i % 5] for i in range(12)]
    padded = torch.where(valid[:, None], x, 1e4)
    masked = bnstats.measure_population_stats(
        layer, [{"input": padded, "valid": valid}], forward=lambda model, b: model(b["input"]),
        mask=lambda batch: batch["valid"],
    )[""]  # fmt: skip
    expected = bnstats.measure_population_stats(layer, samples)[""]
    assert masked.num_samples == expected.num_samples == 12
    torch.testing.assert_close(masked.mean, expected.mean)
    torch.testing.assert_close(masked.sample_spread, expected.sample_spread, rtol=1e-4, atol=1e-4)


def test_saving_and_merging_keep_the_spread_between_samples(tmp_path):
    x, layer = images(40), nn.BatchNorm2d(2)
    whole = bnstats.measure_population_stats(layer, x.split(10))
    parts = [bnstats.measure_population_stats(layer, part.split(10)) for part in x.split(20)]
    merged = parts[0].merge(parts[1])
    merged.save(tmp_path / "stats.npz")
    loaded = PopulationStats.load(tmp_path / "stats.npz")
    assert loaded[""].num_samples == 40
    torch.testing.assert_close(
        loaded[""].sample_covariance, whole[""].sample_covariance, rtol=1e-6, atol=1e-9
    )
    half = [images(3, 1.0)]
    expected, got = (
        bnstats.measure_population_stats(layer, half, prior=p) for p in (whole, loaded)
    )
    torch.testing.assert_close(got[""].mean, expected[""].mean, rtol=1e-6, atol=1e-9)
    without = PopulationStats(
        {"": bnstats.recompute_population_stats(layer, [x]).after[""]}, method="pooled"
    )
    assert merged.merge(without)[""].num_samples == 0


def test_files_without_it_load_and_are_refused_with_how_to_measure_it(tmp_path):
    layer = nn.BatchNorm2d(2)
    stats = bnstats.recompute_population_stats(layer, images(20).split(5)).after
    stats.save(tmp_path / "stats.npz")
    loaded = PopulationStats.load(tmp_path / "stats.npz")
    with pytest.raises(InvalidValueError, match=r"layer ''.*measure_population_stats\(model"):
        bnstats.recompute_population_stats(layer, [images(2)], prior=loaded)


def test_statistics_of_averages_of_one_sample_and_observed_ones_are_no_prior():
    layer = nn.BatchNorm2d(2)
    mixed = bnstats.measure_population_stats(layer, [images(2)], prior=source_of(layer))
    with bnstats.observe(layer) as seen:
        layer(images(20))
    for prior in (
        seen.stats(),
        source_of(layer, method="batch_average"),
        bnstats.measure_population_stats(layer, [images(1)]),
        mixed,
    ):
        with pytest.raises(
            InvalidValueError, match=r"spread between samples.*measure_population_stats\(model"
        ):
            bnstats.measure_population_stats(layer, [images(2)], prior=prior)


def test_bad_priors_are_refused_and_nothing_changes():
    model = conv_net()
    before = networks.snapshot(model)
    source = source_of(model)
    narrow = source_of(nn.Sequential(nn.Identity(), nn.BatchNorm2d(2)))
    for error, match, options in [
        (InvalidTypeError, "PopulationStats.load", {"prior": "stats.npz"}),
        (LayerMismatchError, "none of layer '4'", {"prior": PopulationStats({"1": source["1"]})}),
        (LayerMismatchError, "'1' has 2 channels", {"prior": narrow}),
        (InvalidValueError, '"layerwise"', {"prior": source, "method": "pooled"}),
        (InvalidValueError, "tolerance", {"prior": source, "tolerance": 0.1}),
    ]:
        with pytest.raises(error, match=match):
            bnstats.recompute_population_stats(model, [images(2)], **options)
        networks.assert_untouched(model, before)


def test_the_result_says_the_weights_and_can_be_undone():
    model = conv_net()
    before = networks.snapshot(model)
    result = bnstats.recompute_population_stats(model, [images(3, 1.0)], prior=source_of(model))
    assert "weights of the loader's own statistics" in str(result)
    result.undo()
    networks.assert_untouched(model, before)


def test_samples_that_are_alike_are_warned_of():
    model = conv_net()
    source = source_of(model)
    alike = images(1) + 0.1 * torch.randn(16, 2, 8, 8)
    with pytest.warns(
        BnstatsWarning, match="16 samples differ little from each other: in layer '4"
    ):
        bnstats.measure_population_stats(model, alike.split(4), prior=source)
    for x in (images(16), images(16, 2.0), images(16, scale=0.2)):
        bnstats.measure_population_stats(model, x.split(4), prior=source)


def test_included_layers_alone_are_adapted():
    model = conv_net()
    source = source_of(model)
    first = PopulationStats({"1": source["1"]})
    result = bnstats.recompute_population_stats(
        model, [images(3, 1.0)], prior=first, include=lambda name, _: name == "1"
    )
    assert [*result.after] == ["1"]
