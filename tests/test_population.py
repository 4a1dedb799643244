"""Statistics as a value: applying, comparing, merging, saving; and the table that is printed."""

import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import oracles
from bnstats import LayerStats, PopulationStats
from bnstats.errors import InvalidTypeError, InvalidValueError, LayerMismatchError, StatsFileError


def model():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))


def measured(x=None, **options):
    x = torch.randn(40, 3) * 2 + 1 if x is None else x
    return bnstats.measure_population_stats(model(), x.split(8), **options)


def assert_equal(a, b):
    assert [*a] == [*b]
    assert (a.method, a.num_skipped) == (b.method, b.num_skipped)
    for name in a:
        for key, value in vars(a[name]).items():
            other = getattr(b[name], key)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype == torch.float64
                assert torch.equal(value.nan_to_num(9.5), other.nan_to_num(9.5))
            else:
                assert value == other


def test_applying_writes_in_place_and_leaves_other_layers_alone():
    stats, target = measured(), model()
    buffers = dict(target.named_buffers())
    PopulationStats({"2": stats["2"]}).apply_to(target)
    assert all(buffer is buffers[name] for name, buffer in target.named_buffers())
    assert torch.equal(target[2].running_mean, stats["2"].mean.float())
    assert (target[0].running_mean == 0).all()


def test_another_models_statistics_are_refused_whole():
    stats, other = measured(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(LayerMismatchError, match="'2'"):
        stats.apply_to(other)
    assert (other[0].running_mean == 0).all()
    narrow = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(4))
    with pytest.raises(LayerMismatchError, match=r"layer '2': the statistics have 2.*has 4"):
        stats.drift_from(narrow)


def test_statistics_about_a_mean_are_refused_by_layers_that_keep_theirs_about_zero():
    data = (torch.randn(64, 4) + 3).split(16)
    plain = bnstats.measure_population_stats(nn.Sequential(nn.BatchNorm1d(4)), data)
    model = nn.Sequential(bnstats.MovingAverageBatchNorm1d(4))
    for use in (
        lambda: plain.apply_to(model),
        lambda: plain.drift_from(model),
        lambda: bnstats.recompute_population_stats(model, data, prior=plain),
    ):
        with pytest.raises(LayerMismatchError, match=r"layer '0' .*about zero"):
            use()
    assert not model[0].running_mean.any()
    bnstats.measure_population_stats(model, data).apply_to(model)  # its own


def test_a_write_that_fails_is_rolled_back(monkeypatch):
    stats, target = measured(), model()
    write, calls = torch.Tensor.copy_, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return write(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        stats.apply_to(target)
    assert len(calls) > 3
    for layer in (target[0], target[2]):
        assert (layer.running_mean == 0).all()
        assert (layer.running_var == 1).all()


def test_drift_is_measured_in_what_evaluation_divides_by():
    stats, target = measured(), model()
    target[0].eps = eps = 0.7
    target[0].running_mean.fill_(0.5)
    target[0].running_var.fill_(9.0)
    drift, pop = stats.drift_from(target)["0"], stats["0"]
    mean, var = pop.mean.numpy(), pop.var.numpy()
    np.testing.assert_allclose(drift.mean_shift, (0.5 - mean) / (var + eps) ** 0.5)
    np.testing.assert_allclose(drift.var_ratio, (9 + eps) / (var + eps))
    np.testing.assert_allclose(drift.kl, oracles.gaussian_kl(mean, var + eps, 0.5, 9.0 + eps))


def test_no_drift_from_a_model_just_recalibrated():
    target, data = model(), torch.randn(40, 3).split(8)
    stats = bnstats.recompute_population_stats(target, data).after
    for drift in stats.drift_from(target).values():
        # The float64 statistics were rounded to the buffers' float32.
        assert drift.mean_shift.abs().max() < 1e-6
        assert (drift.var_ratio - 1).abs().max() < 1e-6
        assert drift.kl.abs().max() < 1e-12


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 0.0])
def test_drift_of_dead_channels_is_finite_and_none_from_their_like(eps):
    x = torch.randn(20, 3)
    x[:, 0] = 2.0
    stats, target = measured(x), model()
    target[0].eps = eps
    target[0].running_mean[0], target[0].running_var[0] = 2.0, 0.0
    drift = stats.drift_from(target)["0"]
    assert [float(v[0]) for v in drift] == [0, 1, 0]
    for mean, var in ((1.0, 0.0), (2.0, 5.0), (-1e9, 1e9)):
        target[0].running_mean[0], target[0].running_var[0] = mean, var
        drift = stats.drift_from(target)["0"]
        assert all(values.isfinite().all() for values in drift)
        assert drift.kl[0] > 1
        if eps:
            assert drift.mean_shift[0] == pytest.approx((mean - 2) / eps**0.5)
            assert drift.var_ratio[0] == pytest.approx((var + eps) / eps)
    target[0].running_mean[0], target[0].running_var[1] = 2.0, 0.0  # no variance in training
    assert all(values.isfinite().all() for values in stats.drift_from(target)["0"])


def test_the_table_of_a_network_with_dead_channels_is_readable_and_counts_them():
    x = torch.randn(40, 3)
    x[:, :2] = torch.tensor([0.0, 300.1])  # whose mean float32 rounds
    target = model()
    lines = str(bnstats.recompute_population_stats(target, x.split(8))).splitlines()
    assert "inf" not in "".join(lines[2:])
    assert "nan" not in "".join(lines[2:])
    column = lines[2].split().index("dead")
    assert {line.split()[0]: line.split()[column] for line in lines[4:]} == {"0": "2", "2": "0"}
    assert len({len(line) for line in lines[2:]}) == 1
    x[:, :2] = torch.randn(40, 2)
    assert "dead" not in str(bnstats.recompute_population_stats(target, x.split(8)))


def test_a_layer_with_statistics_that_are_not_finite_is_the_worst():
    target = model()
    target[2].running_mean[0] = torch.nan
    result = bnstats.recompute_population_stats(target, torch.randn(40, 3).split(8))
    assert result.worst_first() == ["2", "0"]


def test_statistics_carry_the_eps_of_their_layer():
    target = model()
    target[2].eps = 1e-3
    stats = bnstats.measure_population_stats(target, torch.randn(40, 3).split(8))
    assert {name: layer.eps for name, layer in stats.items()} == {"0": 1e-5, "2": 1e-3}


def test_the_table_names_the_worst_layer_first_and_every_layer_once():
    target, data = model(), torch.randn(40, 3).split(8)
    target[2].running_mean.fill_(50)
    result = bnstats.recompute_population_stats(target, data)
    lines = str(result).splitlines()
    assert lines[0] == "2 BatchNorm layers recalibrated, method 'pooled'"
    assert [line.split()[0] for line in lines[4:]] == ["2", "0"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert lines[4].split()[1:3] == ["2", "40"]


def test_before_and_after_are_what_they_say():
    target, data = model(), torch.randn(40, 3).split(8)
    target[0].running_mean.fill_(3)
    result = bnstats.recompute_population_stats(target, data)
    assert (result.before["0"].mean == 3).all()
    assert torch.equal(target[0].running_mean, result.after["0"].mean.float())


def test_three_shards_merge_into_the_whole_whatever_the_order():
    x = torch.randn(60, 3) * 2 + 1
    # Only the first layer: the input of a later one depends on how the batches were cut.
    layer = nn.BatchNorm1d(3)
    shards = [
        bnstats.measure_population_stats(layer, part.split(5)) for part in x.split([20, 10, 30])
    ]
    whole = bnstats.measure_population_stats(layer, x.split(5))[""]
    for a, b, c in ((0, 1, 2), (2, 0, 1)):
        merged = shards[a].merge(shards[b]).merge(shards[c])[""]
        assert (merged.count, merged.num_batches) == (60, 12)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.var, whole.var, rtol=1e-12, atol=0)
        # Strata against one sample: the same but for what the shards' own means take out.
        torch.testing.assert_close(merged.mean_stderr, whole.mean_stderr, rtol=0.5, atol=0)


def test_what_does_not_merge_says_so():
    with pytest.raises(InvalidValueError, match='"pooled" and "ema"'):
        measured().merge(measured(method="ema"))
    with pytest.raises(LayerMismatchError, match=r"correction 1.*correction 0"):
        measured().merge(measured(correction=0))
    with pytest.raises(InvalidTypeError, match="got dict"):
        measured().merge({})
    layers = {name: replace(layer, eps=1e-3) for name, layer in measured().items()}
    with pytest.raises(LayerMismatchError, match=r"'0' has eps 1e-05 here and 0\.001"):
        measured().merge(PopulationStats(layers))


def test_a_layer_that_one_has_measured_is_not_frozen_after_a_merge():
    net, x = model(), torch.randn(8, 3)
    net[0].eval()
    frozen = bnstats.measure_population_stats(net, [x])
    assert frozen.frozen == ("0",)
    both = frozen.merge(bnstats.measure_population_stats(net.train(), [x]))
    assert (both.frozen, [*both], both["2"].count) == ((), ["2", "0"], 16)


def test_statistics_without_a_layer_in_common_do_not_merge_and_empty_ones_change_nothing():
    stats = measured()
    other = PopulationStats({f"module.{name}": layer for name, layer in stats.items()})
    with pytest.raises(LayerMismatchError, match=r"no layer in common.*'0'.*'module\.0'"):
        stats.merge(other)
    assert_equal(stats.merge(PopulationStats({})), stats)
    assert_equal(PopulationStats({}).merge(stats), stats)
    part = PopulationStats({"2": stats["2"]})
    assert {name: layer.count for name, layer in stats.merge(part).items()} == {"0": 40, "2": 80}


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema"])
def test_a_file_gives_back_what_was_saved_to_the_last_bit(tmp_path, method):
    stats = measured(method=method)
    stats.save(tmp_path / "stats.npz")
    assert_equal(PopulationStats.load(tmp_path / "stats.npz"), stats)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


def test_a_file_keeps_nan_errors_of_a_single_batch_and_any_layer_name(tmp_path):
    one = bnstats.measure_population_stats(nn.BatchNorm1d(3), [torch.randn(8, 3)])
    assert one[""].mean_stderr.isnan().all()
    one.save(tmp_path / "no suffix")
    assert_equal(PopulationStats.load(tmp_path / "no suffix"), one)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    stats, path = measured(), tmp_path / "stats.npz"
    stats.save(path)
    old = path.read_bytes()

    def failing(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", failing)
    with pytest.raises(OSError, match="disk full"):
        stats.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


def damaged(path):
    yield b""
    yield b"not a zip"
    whole = path.read_bytes()
    yield whole[: len(whole) // 2]
    yield whole[:-20]
    middle = len(whole) // 2
    yield whole[:middle] + bytes(64) + whole[middle + 64 :]
    yield pickle.dumps({"mean": 0})


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    path, bad = tmp_path / "stats.npz", tmp_path / "bad.npz"
    measured().save(path)
    for content in damaged(path):
        bad.write_bytes(content)
        with pytest.raises(StatsFileError, match=r"bad\.npz: expected a file that"):
            PopulationStats.load(bad)
    np.savez(bad, mean=np.zeros(3))
    with pytest.raises(StatsFileError):
        PopulationStats.load(bad)
    np.save(tmp_path / "bad.npy", np.zeros(3))
    with pytest.raises(StatsFileError):
        PopulationStats.load(tmp_path / "bad.npy")
    torch.save({"a": 1}, bad)
    with pytest.raises(StatsFileError):
        PopulationStats.load(bad)
    with pytest.raises(FileNotFoundError):
        PopulationStats.load(tmp_path / "missing.npz")


def test_a_file_of_a_later_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bnstats.recomputation.files._VERSION", 2)
    measured().save(tmp_path / "stats.npz")
    monkeypatch.undo()
    with pytest.raises(StatsFileError, match="version 2"):
        PopulationStats.load(tmp_path / "stats.npz")


def test_a_file_holds_no_pickle(tmp_path):
    measured().save(tmp_path / "stats.npz")
    with zipfile.ZipFile(tmp_path / "stats.npz") as archive:
        assert all(name.endswith(".npy") for name in archive.namelist())
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_statistics_with_tensors_of_different_shapes_are_refused():
    with pytest.raises(InvalidValueError, match=r"var: expected shape \(2,\), got \(3,\)"):
        LayerStats(1, 1, torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema"])
def test_standard_errors_are_those_of_the_definition_for_equal_batches(method):
    x = torch.randn(50, 8, 3, dtype=torch.float64) * 2 + 5 + torch.randn(50, 1, 3)
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3, dtype=torch.float64), [*x], method=method
    )[""]
    means, weights = x.mean(1), torch.full((50,), 1 / 50, dtype=torch.float64)
    spreads = ((x - x.mean((0, 1))) ** 2).mean(1) * (400 / 399) if method == "pooled" else x.var(1)
    if method == "ema":
        weights = torch.tensor([0.1 * 0.9 ** (49 - i) for i in range(50)], dtype=torch.float64)
        weights /= weights.sum()
    scale = weights.square().sum().sqrt()
    np.testing.assert_allclose(stats.mean_stderr, means.std(0) * scale, rtol=1e-9)
    np.testing.assert_allclose(stats.var_stderr, spreads.std(0) * scale, rtol=1e-9)
