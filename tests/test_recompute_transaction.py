"""A recalibration is a transaction: after any failure the model is unchanged."""

import copy
import threading

import pytest
import torch
from torch import nn

import bnstats
from bnstats.errors import InvalidValueError, NonFiniteStatisticsError
from networks import METHODS, assert_untouched, mix_modes, snapshot, trained, uneven


def test_measuring_writes_nothing():
    model = trained()
    before = snapshot(model)
    bnstats.measure_population_stats(model, uneven())
    assert_untouched(model, before)


def test_only_running_mean_and_var_change_and_in_place():
    model = trained()
    tensors, *rest = snapshot(model)
    bnstats.recompute_population_stats(model, uneven())
    after, *rest_after = snapshot(model)
    assert rest_after == rest
    for key, (identity, value) in after.items():
        assert identity == tensors[key][0]
        changed = key.endswith(("running_mean", "running_var"))
        assert torch.equal(value, tensors[key][1]) != changed, key


def test_undo_puts_everything_back_bit_for_bit():
    model = trained()
    before = snapshot(model)
    bnstats.recompute_population_stats(model, uneven()).undo()
    assert_untouched(model, before)


def test_a_second_undo_is_an_error_and_a_training_in_between_is_kept():
    model = trained()
    result = bnstats.recompute_population_stats(model, uneven())
    result.undo()
    model.train()
    for batch in uneven():
        model(batch)
    before = snapshot(model)
    for undone in (result, copy.copy(result)):
        with pytest.raises(InvalidValueError, match=r"undo: expected one call, .* undone already"):
            undone.undo()
    assert_untouched(model, before)


class Failing(nn.Module):
    def __init__(self, error, batch):
        super().__init__()
        self.error, self.batch, self.calls = error, batch, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.batch:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["loader", "model", "forward", "last layer"])
@pytest.mark.parametrize("method", [*METHODS, "layerwise", "sweeps"])
def test_whatever_is_raised_leaves_the_model_as_it_was(method, error, where):
    # torch's update_bn leaves reset statistics and momentum None behind.
    model, data = trained(), uneven()
    if where == "model":
        model.insert(4, Failing(error, 2))
    if where == "last layer":
        model.append(Failing(error, 0))
    mix_modes(model)
    before = snapshot(model)

    class Broken:
        def __iter__(self):
            yield from data[:2]
            raise error

    def forward(model, batch):
        model(batch)
        raise error

    with pytest.raises(type(error)):
        bnstats.recompute_population_stats(
            model,
            Broken() if where == "loader" else data,
            method=method,
            forward=forward if where == "forward" else None,
        )
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [*METHODS, "sweeps"])
def test_a_bad_batch_raises_with_its_index_and_layers_and_touches_nothing(value, method):
    model, data = trained(), uneven()
    data[2][0, 0, 0, 0] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteStatisticsError, match=r"batch 2 .*3 layers, the first '1'.*'8'"):
        bnstats.recompute_population_stats(model, data, method=method)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_batch_skipped_counts_for_no_layer(method):
    model, data = trained(), uneven()
    good = bnstats.recompute_population_stats(copy.deepcopy(model), data, method=method).after
    bad = torch.full_like(data[0], float("nan"))
    result = bnstats.recompute_population_stats(
        model, [data[0], bad, *data[1:], bad], method=method, on_nonfinite="skip"
    )
    assert result.after.num_skipped == 2
    assert "2 batches with non-finite statistics skipped" in str(result)
    for name in good:
        assert torch.equal(result.after[name].mean, good[name].mean)
        assert torch.equal(result.after[name].var, good[name].var)
        assert result.after[name].count == good[name].count


def test_finite_statistics_whose_sum_is_not_count():
    x = torch.randn(50, 40, dtype=torch.float64) * 1e153  # squares of 1e306, near the largest
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(40).double(), [x])
    torch.testing.assert_close(stats[""].var * 1e-306, (x * 1e-153).var(0))


def test_nothing_but_bad_batches_is_an_error_even_when_skipped():
    with pytest.raises(NonFiniteStatisticsError, match="all 2 batches"):
        bnstats.measure_population_stats(
            nn.BatchNorm1d(2), [torch.full((4, 2), torch.nan)] * 2, on_nonfinite="skip"
        )


def test_dropout_is_off_and_gradients_are_not_kept():
    flags = []

    class Probe(nn.Module):
        def forward(self, x):
            flags.append((self.training, torch.is_grad_enabled(), x.requires_grad))
            return x

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), Probe(), nn.BatchNorm1d(2)).train()
    bnstats.recompute_population_stats(model, [torch.randn(8, 2)])
    assert flags == [(False, False, False)]
    assert all(module.training for module in model.modules())


def test_each_modules_own_training_flag_comes_back():
    model = trained()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    flags = [module.training for module in model.modules()]
    bnstats.recompute_population_stats(model, uneven())
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("method", [*METHODS, "layerwise", "sweeps"])
def test_a_model_that_is_being_measured_is_refused_and_comes_back_as_it_was(method):
    # Of two measurements at a time, the one that ended last put back what the other had put in.
    model, data = trained(), uneven()
    before = snapshot(model)

    def measuring(model, batch):
        bnstats.measure_population_stats(model, [batch])

    with pytest.raises(InvalidValueError, match="is being measured already"):
        bnstats.measure_population_stats(model, data, method=method, forward=measuring)
    assert_untouched(model, before)
    errors = []

    def elsewhere(model, batch):
        def run():
            try:
                bnstats.recompute_population_stats(model, data, include=lambda name, _: name == "1")
            except InvalidValueError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return model(batch)

    stats = bnstats.measure_population_stats(model, data, method=method, forward=elsewhere)
    assert len(errors) == stats["1"].num_batches * (3 if method == "sweeps" else 1)
    assert_untouched(model, before)


def test_undo_of_a_layer_that_has_lost_its_statistics_says_so_and_writes_nothing():
    model = trained()
    result = bnstats.recompute_population_stats(model, uneven())
    model[5].running_mean = None
    before = model[1].running_mean.clone()
    with pytest.raises(InvalidValueError, match=r"undo: layer '5' .*running_mean"):
        result.undo()
    assert torch.equal(model[1].running_mean, before)


TRAINING = {
    "by forward": lambda model, x: model.train()(x),
    "layers alone": lambda model, x: ([m.train() for m in model.children()], model(x))[1],
}


@pytest.mark.parametrize("forward", TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("family", ["plain", "ema", "cumulative", "moving_average", "renorm"])
@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_a_forward_that_switches_to_training_mode_moves_nothing(method, family, forward):
    data = list(torch.randn(4, 16, 4) * 3 + 1)
    parts = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3), nn.BatchNorm1d(3)
    model = nn.Sequential(*parts)
    if family != "plain":
        bnstats.convert_batchnorm(model, family)
    for x in data:
        model(x)
    expected = bnstats.measure_population_stats(model.eval(), data, method=method)
    before = snapshot(model)
    options = {"forward": forward, "method": method}
    found = bnstats.measure_population_stats(model, data, **options)
    for name, stats in expected.items():
        torch.testing.assert_close(found[name].var, stats.var)
    # Layers that are not measured move nothing either.
    only_last = {"include": lambda name, _: name == "4"}
    bnstats.measure_population_stats(model, data, **options, **only_last)
    assert_untouched(model, before)
