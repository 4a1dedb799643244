"""Cumulative statistics: exact over long trainings, and at peace with those who write to them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import oracles
from cases import assert_state, state

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 3


def make(**options):
    return bnstats.CumulativeBatchNorm1d(CHANNELS, **options)


def data(count, mean=0.0, scale=1.0, sizes=(4,)):
    return [torch.randn(sizes[i % len(sizes)], CHANNELS) * scale + mean for i in range(count)]


def assert_statistics_of(layer, batches, tolerance=1e-6):
    """The exact statistics to so many deviations, the running ones to their dtype's rounding."""
    mean, var = oracles.mean_var(batches)
    deviation = np.sqrt(var)
    assert np.abs((layer.exact_mean.numpy() - mean) / deviation).max() < tolerance
    assert np.abs(layer.exact_var.numpy() / var - 1).max() < tolerance
    assert torch.equal(layer.running_mean, layer.exact_mean.to(layer.running_mean.dtype))
    assert torch.equal(layer.running_var, layer.exact_var.to(layer.running_var.dtype))


class TestPrecision:
    @pytest.mark.parametrize("drift", [0.0, 2.0])
    @torch.no_grad()
    def test_40_000_batches_stray_by_less_than_a_millionth_of_a_deviation(self, drift):
        count, layer = 40_000, make()
        x = torch.randn(count, 2, CHANNELS, dtype=torch.float64)
        x += torch.linspace(1000, 1000 + drift, count, dtype=torch.float64).view(-1, 1, 1)
        # What the layer's kernel leaves of each batch, rounded to float32 as that does.
        means, variances = x.mean(1).float(), x.var(1).float()
        for mean, var in zip(means, variances, strict=True):
            layer._track_on_host(mean, var, 2)
        assert layer.num_values_tracked == 2 * count
        assert_statistics_of(layer, [x.reshape(-1, CHANNELS)])

    @torch.no_grad()
    def test_it_stays_exact_on_every_path(self, run):
        layer = make()
        batches = data(100, mean=1000.0, sizes=(2, 4, 3))
        for x in batches:
            run(layer, x)
        # A batch's own mean is rounded to float32, by 3e-5 of these deviations, and 100 average.
        assert_statistics_of(layer, batches, tolerance=1e-5)

    @torch.no_grad()
    def test_a_billion_values_before_do_not_drown_a_batch(self, run):
        # 1 / 2^31 of a mean of 1000 is far below float32's steps there.
        layer, before, after = make(), 1 << 30, 1 << 7
        layer(torch.tensor([[-1.0], [1.0]]).repeat(8, CHANNELS) + 1000)
        layer.num_values_tracked.fill_(before)
        mean, var = layer.exact_mean[0].item(), layer.exact_var[0].item()
        x = torch.tensor([[-1.0], [1.0]]).repeat(2, CHANNELS) + 1008
        for _ in range(after):
            run(layer, x)
        n = 4 * after
        share, unit = n / (before + n), (before + n - 1)
        expected = mean + 8 * share
        spread = (before - 1) * var + n + 64 * before * share
        assert abs(layer.exact_mean - expected).max() < 1e-10
        assert abs(layer.exact_var / (spread / unit) - 1).max() < 1e-10
        assert layer.num_values_tracked == before + n


class TestOthersWrite:
    """Trainers, wrappers and checkpoints know torch's buffers, and not ours."""

    def test_weight_averaging_of_lightning_starts_it_anew(self, run):
        layer, new = make(), make()
        for x in data(5, mean=2.8):
            run(layer, x)
        reset_as_lightning_does(layer)
        for x in data(5, mean=10.0, scale=3.0):
            run(layer, x)
            run(new, x)
            assert_state(layer, state(new))

    def test_a_counter_at_0_starts_it_anew(self, run):
        layer, new = make(), make()
        for x in data(5, mean=2.8):
            run(layer, x)
        layer.num_batches_tracked.zero_()
        for x in data(5, mean=10.0):
            run(layer, x)
            run(new, x)
        assert_state(layer, state(new))

    def test_its_own_reset_starts_it_anew(self, run):
        layer, new = make(), make()
        for x in data(5, mean=2.8):
            run(layer, x)
        layer.reset_running_stats()
        assert_state(layer, state(new))
        for x in data(5, mean=10.0):
            run(layer, x)
            run(new, x)
        assert_state(layer, state(new))

    def test_statistics_that_others_write_are_those_it_goes_on_from(self, run):
        layer = make()
        first, second = data(5), data(1)[0]
        for x in first:
            run(layer, x)
        layer.running_mean.fill_(7.0)
        layer.running_var.fill_(2.0)
        run(layer, second)
        n, batch = 20, len(second)
        m, s = oracles.mean_var([second])
        share = batch / (n + batch)
        var = ((n - 1) * 2 + (batch - 1) * s + n * share * (m - 7) ** 2) / (n + batch - 1)
        np.testing.assert_allclose(layer.running_mean, 7 + share * (m - 7), rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)

    def test_one_channel_that_others_write_leaves_the_rest_exact(self, run):
        layer, other = make(), make()
        for x in data(20, mean=1000.0):
            run(layer, x)
            run(other, x)
        layer.running_mean[0] = 3.0
        x = data(1, mean=1000.0)[0]
        run(layer, x)
        run(other, x)
        assert torch.equal(layer.exact_mean[1:], other.exact_mean[1:])
        assert torch.equal(layer.exact_var[1:], other.exact_var[1:])
        assert layer.exact_mean[0] < 100

    def test_buffers_that_ddp_copies_in_place_are_those_it_goes_on_from(self, run):
        source, replica = make(), make()
        for x in data(10, mean=1000.0):
            run(source, x)
            run(replica, x * 2)
        for x in data(3, mean=1000.0):
            # DistributedDataParallel does so before each forward, to every buffer.
            for ours, theirs in zip(replica.buffers(), source.buffers(), strict=True):
                ours.detach().copy_(theirs)
            run(replica, x)
            run(source, x)
            assert_state(replica, state(source))

    def test_buffers_that_are_replaced_are_those_it_goes_on_from(self, run):
        layer, other = make(), make()
        for x in data(10):
            run(layer, x)
            run(other, x * 2)
        for name, buffer in other.named_buffers():
            setattr(layer, name, buffer.clone())
        x = data(1)[0]
        run(layer, x)
        run(other, x)
        assert_state(layer, state(other))

    def test_a_buffer_that_takes_the_place_of_a_freed_one_is_noticed(self, run):
        layer, other = make(), make()
        for x in data(10):
            run(layer, x)
            run(other, x)
        # Freed first, so that Python may well give the new one the old one's identity.
        writes = layer.running_mean._version
        layer.running_mean = None
        new = torch.zeros(CHANNELS)
        for _ in range(writes):
            new.fill_(7.0)
        layer.running_mean = new
        other.running_mean.fill_(7.0)
        x = data(1)[0]
        run(layer, x)
        run(other, x)
        assert_state(layer, state(other))

    def test_a_trained_layer_loads_where_torch_swaps_tensors(self):
        # torch.utils.swap_tensors refuses a tensor that something refers to weakly
        layer, other = make(), make()
        for x in data(4):
            layer(x)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer.load_state_dict(other.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        x = data(1)[0]
        layer(x)
        other(x)
        assert_state(layer, state(other))

    def test_averaged_models_average_its_buffers_too(self, run):
        model = nn.Sequential(make())
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        means = []
        for x in data(6, mean=1000.0):
            run(model[0], x)
            averaged.update_parameters(model)
            means.append(model[0].running_mean.double())
        layer = averaged.module[0]
        expected = torch.stack(means).mean(0).float()
        # float32's rounding at 1000, in each of the averages.
        torch.testing.assert_close(layer.running_mean, expected, rtol=1e-6, atol=0)
        before = layer.running_mean.clone()
        x = data(1, mean=1000.0)[0]
        n = layer.num_values_tracked.item()
        run(layer, x)
        torch.testing.assert_close(
            layer.running_mean, before + (x.mean(0) - before) * 4 / (n + 4), rtol=1e-6, atol=0
        )

    def test_torchs_recalibration_of_an_averaged_model_is_exact(self):
        model = nn.Sequential(make())
        for x in data(3):
            model(x)
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        batches = data(40, mean=1000.0, sizes=(4, 2))
        torch.optim.swa_utils.update_bn(batches, averaged)
        assert_statistics_of(averaged.module[0], batches, tolerance=1e-5)


def reset_as_lightning_does(layer):
    """What StochasticWeightAveraging does to each BatchNorm before its last epoch."""
    layer.running_mean = torch.zeros_like(layer.running_mean)
    layer.running_var = torch.ones_like(layer.running_var)
    layer.momentum = None
    layer.num_batches_tracked *= 0


def test_weight_averaging_of_lightning_starts_the_exponential_average_anew(run):
    layer, new = (bnstats.EMABatchNorm1d(CHANNELS, momentum=m) for m in (0.1, None))
    for x in data(5, mean=2.8):
        run(layer, x)
    reset_as_lightning_does(layer)
    for x in data(5, mean=10.0, scale=3.0):
        run(layer, x)
        run(new, x)
    assert_state(layer, state(new))


def test_weight_averaging_of_lightning_averages_mean_squares_about_zero(run):
    layer = bnstats.MovingAverageBatchNorm1d(CHANNELS, warmup=1000)
    for x in data(5, mean=2.8):
        run(layer, x)
    reset_as_lightning_does(layer)
    batches = data(5, mean=10.0, scale=3.0)
    for x in batches:
        run(layer, x)
    expected = torch.cat(batches).double().square().mean(0)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-6, atol=0)
    assert not layer.running_mean.any()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state_dict": lambda layer: loaded(layer.state_dict()),
    "assigned": lambda layer: loaded(copy.deepcopy(layer.state_dict()), assign=True),
}


def test_a_layer_whose_statistics_were_taken_away_still_moves():
    # As TENT and torch.func.replace_all_batch_norm_modules_ do.
    layer = make()
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = None
    layer.to("cpu").double()
    assert layer(torch.randn(8, layer.num_features).double()).dtype == torch.float64


class TestState:
    """What is saved, copied or converted goes on as if nothing had been."""

    def trained(self, run):
        # Digits that float32 cannot hold: what is lost shows.
        layer = make()
        for x in data(10, mean=1000.0):
            run(layer, x)
        assert not torch.equal(layer.exact_mean, layer.running_mean.double())
        return layer

    @pytest.mark.parametrize("way", COPIES)
    def test_a_copy_goes_on_with_every_digit(self, run, way):
        layer = self.trained(run)
        other = COPIES[way](layer)
        assert_state(other, state(layer))
        for x in data(3, mean=1000.0):
            run(layer, x)
            run(other, x)
            assert_state(other, state(layer))

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_checkpoint_that_is_loaded_in_mid_training_is_gone_back_to(self, run, assign):
        layer = self.trained(run)
        saved = copy.deepcopy(layer.state_dict())
        first, second = data(3, mean=1000.0), data(3, mean=1000.0)
        for x in first:
            run(layer, x)
        expected = state(layer)
        for x in second:
            run(layer, x)
        layer.load_state_dict(saved, assign=assign)
        for x in first:
            run(layer, x)
        assert_state(layer, expected)

    def test_a_plain_checkpoint_is_shown_until_the_first_batch_replaces_it(self, run):
        layer, plain, new = self.trained(run), nn.BatchNorm1d(CHANNELS), make()
        plain(data(1, mean=5.0)[0])
        layer.load_state_dict(plain.state_dict(), strict=True)
        x = data(1)[0]
        assert torch.equal(layer.eval()(x), plain.eval()(x))
        layer.train()
        run(layer, x)
        run(new, x)
        # torch's counter is the checkpoint's; ours counts from here on.
        assert layer.num_values_tracked == 4
        for key in ("running_mean", "running_var", "exact_mean", "exact_var"):
            assert torch.equal(state(layer)[key], state(new)[key]), key

    def test_a_checkpoint_without_the_wide_statistics_goes_on_from_the_running_ones(self, run):
        layer = self.trained(run)
        saved = {k: v for k, v in layer.state_dict().items() if not k.startswith("exact")}
        other = loaded(saved)
        assert other.num_values_tracked == 40
        assert torch.equal(other.exact_mean, layer.running_mean.double())
        x = data(1, mean=1000.0)[0]
        run(layer, x)
        run(other, x)
        torch.testing.assert_close(other.running_mean, layer.running_mean, rtol=2e-7, atol=0)

    def test_its_checkpoint_has_torchs_keys_and_three_more(self):
        keys = list(make().state_dict())
        plain = list(nn.BatchNorm1d(CHANNELS).state_dict())
        assert keys == [*plain, "num_values_tracked", "exact_mean", "exact_var"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_another_dtype_and_back_costs_no_digits(self, run, dtype):
        layer = self.trained(run)
        other = copy.deepcopy(layer)
        layer.to(dtype)
        assert {layer.running_mean.dtype, layer.running_var.dtype} == {dtype}
        assert {layer.exact_mean.dtype, layer.exact_var.dtype} == {torch.float64}
        layer.float()
        for x in data(3, mean=1000.0):
            run(layer, x)
            run(other, x)
        assert_state(layer, state(other))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_running_statistics_are_those_of_all_values_rounded_once(self, run, dtype):
        layer = self.trained(run)
        exact = layer.exact_mean.clone()
        layer.to(dtype)
        batches = [x.to(dtype) for x in data(20, mean=1000.0)]
        for x in batches:
            run(layer, x)
        mean = torch.cat(batches).double().mean(0)
        expected = (exact * 40 + mean * 80) / 120
        torch.testing.assert_close(layer.exact_mean, expected, rtol=1e-6, atol=0)
        assert torch.equal(layer.running_mean, expected.to(dtype))

    def test_what_half_precision_cannot_hold_comes_back(self, run):
        layer = make()
        batches = data(3, scale=400.0)
        for x in batches:
            run(layer, x)
        layer.half()
        assert layer.running_var.isinf().all()
        layer.float()
        batches += data(1, scale=400.0)
        run(layer, batches[-1])
        assert_statistics_of(layer, batches)

    def test_double_precision_goes_on_with_every_digit(self, run):
        layer = self.trained(run)
        other = copy.deepcopy(layer)
        layer.double()
        x = data(1, mean=1000.0)[0]
        run(layer, x.double())
        run(other, x)
        torch.testing.assert_close(layer.exact_mean, other.exact_mean, rtol=1e-8, atol=0)


def loaded(checkpoint, **options):
    layer = make()
    layer.load_state_dict(checkpoint, strict=True, **options)
    return layer
