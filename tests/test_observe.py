"""Statistics of forwards that the user runs: all of them, and nothing else is different."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import networks
from bnstats.errors import (
    BnstatsWarning,
    InvalidTypeError,
    InvalidValueError,
    NonFiniteStatisticsError,
)
from bnstats.recomputation.collector import Collector
from cases import FAMILIES, batches, each_family

pytestmark = pytest.mark.usefixtures("one_thread")


def observed_inputs(model, data):
    """What each layer is given, all of it, in float64: the oracle."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            record = seen.setdefault(name, [])
            hook = module.register_forward_pre_hook(lambda _, a, r=record: r.append(a[0].double()))
            hooks.append(hook)
    with torch.no_grad():
        for x in data:
            model(x)
    for hook in hooks:
        hook.remove()
    rows = {name: [x.movedim(1, -1).flatten(0, -2) for x in xs] for name, xs in seen.items()}
    return {name: torch.cat(parts) for name, parts in rows.items()}


def assert_stats_of(stats, values, tolerance=1e-6):
    assert stats.keys() == values.keys()
    for name, x in values.items():
        assert stats[name].count == len(x)
        torch.testing.assert_close(stats[name].mean, x.mean(0), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(stats[name].var, x.var(0), rtol=tolerance, atol=tolerance)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_of_every_input_in_either_mode(training):
    model, data = without_dropout(networks.trained()).train(training), networks.uneven()
    expected = observed_inputs(copy.deepcopy(model), data)
    with bnstats.observe(model) as seen:
        for x in data:
            model(x)
    assert_stats_of(seen.stats(), expected)
    assert seen.num_batches == len(data)
    assert {stats.num_batches for stats in seen.stats().values()} == {len(data)}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_does_what_it_does_without(training):
    model = without_dropout(networks.trained()).train(training)
    other = copy.deepcopy(model)
    with bnstats.observe(model) as seen:
        for x in networks.uneven():
            outputs = [m(x) for m in (model, other)]
            for output in outputs:
                output.square().sum().backward()
            assert torch.equal(*outputs)
    seen.stats()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each_family
def test_a_pass_in_training_mode_is_what_measuring_finds(family):
    """Pooled, with standard errors; about zero for a layer that has no mean."""
    model = nn.Sequential(nn.Linear(3, 4), family.make(1, 4), nn.ReLU(), nn.Linear(4, 4))
    data = batches((8, 3))
    expected = bnstats.measure_population_stats(model, data)
    with bnstats.observe(model.eval()) as seen:
        for x in data:
            model(x)
    stats = seen.stats()
    for field in ("mean", "var", "mean_stderr", "var_stderr", "spread"):
        torch.testing.assert_close(getattr(stats["1"], field), getattr(expected["1"], field))


def test_in_a_model_recalibrated_layerwise_its_means_are_the_fixed_point():
    model = networks.trained()
    data = networks.uneven()
    after = bnstats.recompute_population_stats(model, data, method="layerwise").after
    model.eval()
    with bnstats.observe(model) as seen, torch.no_grad():
        for x in data:
            model(x)
    stats = seen.stats()
    for name, layer in after.items():
        scale = layer.var.sqrt()
        assert ((stats[name].mean - layer.mean) / scale).abs().max() < 1e-6
        torch.testing.assert_close(stats[name].var, layer.var, rtol=1e-5, atol=0)
    for drift in stats.drift_from(model).values():
        assert drift.mean_shift.abs().max() < 1e-5


def test_standard_errors_are_those_of_a_sample_of_forwards():
    """Of repeated observations the means scatter as much as each says of itself."""
    model, found = nn.Sequential(nn.BatchNorm1d(3)).eval(), []
    for _ in range(200):
        with bnstats.observe(model) as seen:
            for _ in range(20):
                model(torch.randn(8, 3) + torch.randn(3))  # a forward's values are alike
        found.append(seen.stats()["0"])
    scatter = torch.stack([stats.mean for stats in found]).std(0)
    said = torch.stack([stats.mean_stderr for stats in found]).square().mean(0).sqrt()
    assert ((scatter / said - 1).abs() < 0.2).all()  # the scatter itself is known to 5 %


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
def test_it_sees_under_every_mode_and_across_them(first, then):
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    with bnstats.observe(model) as seen:
        with MODES[first]():
            model(data[0])
            seen.stats()
        with MODES[then]():
            model(data[1])
            stats = seen.stats()
        model(data[2])
    assert_stats_of(stats, observed_inputs(model, data[:2]), 2e-2)
    assert_stats_of(seen.stats(), observed_inputs(model, data[:3]), 2e-2)


def test_contexts_may_overlap_and_see_each_its_own():
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    contexts = [bnstats.observe(model) for _ in range(2)]
    first = contexts[0].__enter__()
    model(data[0])
    second = contexts[1].__enter__()
    model(data[1])
    contexts[0].__exit__(None, None, None)
    model(data[2])
    contexts[1].__exit__(None, None, None)
    model(data[3])
    assert_stats_of(first.stats(), observed_inputs(model, data[:2]))
    assert_stats_of(second.stats(), observed_inputs(model, data[1:3]))


def test_overlapping_contexts_leave_compiled_code_as_it_was():
    from torch._dynamo.testing import CompileCounter

    model, x, counter = networks.trained().eval(), networks.uneven()[0], CompileCounter()
    compiled = torch.compile(model, backend=counter)
    expected = compiled(x)
    first, second = bnstats.observe(compiled), bnstats.observe(compiled)
    seen = first.__enter__(), second.__enter__()
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    first.__exit__(None, None, None)
    compiled(x)
    second.__exit__(None, None, None)
    assert [observation.num_batches for observation in seen] == [1, 2]
    assert counter.frame_count == 1
    torch.compiler.reset()
    compiled(x)
    assert counter.frame_count == 2  # it compiles again


def test_an_error_ends_the_context_and_a_failed_forward_does_not_count():
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    context = bnstats.observe(model)
    seen = context.__enter__()
    model(data[0])
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 2, 9, 9))  # the last layers do not take it
    model(data[1])
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_stats_of(seen.stats(), observed_inputs(model, data[:2]))


def test_parts_called_by_themselves_count_until_a_layer_comes_again():
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    with bnstats.observe(model) as seen:
        for x in data:
            y = model[:4](x)
            model[4:](y)
    stats = seen.stats()
    assert_stats_of(stats, observed_inputs(model, data))
    assert {layer.num_batches for layer in stats.values()} == {len(data)}


def test_a_layer_called_twice_in_a_forward_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(input=self.bn(x) * 2)

    model, data = Twice().eval(), batches((8, 3))
    with bnstats.observe(model) as seen:
        for x in data:
            model(x)
    stats = seen.stats()["bn"]
    assert (stats.count, stats.num_batches) == (80, 5)
    values = torch.cat([torch.cat([x, 2 * model.bn(x)]) for x in data]).double()
    torch.testing.assert_close(stats.mean, values.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_run_again_by_a_checkpoint_counts_once(use_reentrant):
    model = without_dropout(networks.trained())
    x = networks.uneven()[0].requires_grad_()
    with bnstats.observe(model) as seen:
        for _ in range(2):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert {(s.num_batches, s.count) for s in seen.stats().values()} == {
        (2, 2 * 8 * 36), (2, 2 * 8 * 16), (2, 2 * 8)
    }  # fmt: skip


def test_threads_see_together():
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    with bnstats.observe(model) as seen:
        threads = [threading.Thread(target=model, args=(x,)) for x in data]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_stats_of(seen.stats(), observed_inputs(model, data))


def test_wrappers_are_seen_through_and_include_chooses():
    model = networks.trained().eval()
    wrapped = torch.optim.swa_utils.AveragedModel(model).eval()
    with bnstats.observe(wrapped, lambda name, _: name != "5") as seen:
        wrapped(networks.uneven()[0])
    assert [*seen.stats()] == ["1", "8"]
    assert [*seen.stats().drift_from(model)] == ["1", "8"]


def test_frozen_and_held_layers_are_observed():
    model = bnstats.freeze_statistics(networks.network(), lambda name, _: name == "5")
    with bnstats.observe(model) as seen, bnstats.hold_statistics(model):
        model(networks.uneven()[0])
    assert [*seen.stats()] == ["1", "5", "8"]


def test_measuring_in_the_context_finds_what_it_does_without():
    model, data = networks.trained(), networks.uneven()
    expected = bnstats.measure_population_stats(copy.deepcopy(model), data, method="layerwise")
    with bnstats.observe(model) as seen:
        after = bnstats.measure_population_stats(model, data, method="layerwise")
    for name, layer in expected.items():
        # Measuring takes the samples along, and adds up in another order.
        torch.testing.assert_close(after[name].mean, layer.mean, rtol=1e-12, atol=1e-12)
    assert seen.stats()["1"].count == expected["1"].count


def test_forwards_that_are_not_finite_are_left_out_with_a_warning():
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    with bnstats.observe(model) as seen:
        model(data[0])
        model(torch.full((2, 2, 8, 8), torch.nan))
    with pytest.warns(BnstatsWarning, match="1 of 2 forwards had values that are not finite"):
        stats = seen.stats()
    assert stats.num_skipped == 1
    assert_stats_of(stats, observed_inputs(model, data[:1]))
    with bnstats.observe(model) as seen:
        model(torch.full((2, 2, 8, 8), torch.nan))
    with pytest.raises(NonFiniteStatisticsError, match="all 1"):
        seen.stats()


def test_what_has_no_values_is_not_observed_and_said_so():
    model, x = networks.trained().eval(), networks.uneven()[0]
    with bnstats.observe(model) as seen:
        torch.vmap(model)(x[None])
        torch.func.grad(lambda y: model(y).sum())(x)
        model(x)
    with pytest.warns(BnstatsWarning, match="6 inputs of layers were not observed"):
        assert_stats_of(seen.stats(), observed_inputs(model, [x]))


def test_nothing_observed_is_an_error_and_a_layer_not_reached_a_warning():
    model = networks.trained().eval()
    with bnstats.observe(model) as seen:
        pass
    with pytest.raises(InvalidValueError, match=r"at least one forward .* its 3 BatchNorm"):
        seen.stats()
    with bnstats.observe(model) as seen:
        model[:3](networks.uneven()[0])
    with pytest.warns(BnstatsWarning, match="'5', '8'"):
        assert [*seen.stats()] == ["1"]


def test_bad_input():
    with pytest.raises(InvalidTypeError, match=r"expected a torch\.nn\.Module, got int"):
        bnstats.observe(3)
    with pytest.raises(InvalidTypeError, match="lazy"):
        bnstats.observe(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.warns(BnstatsWarning, match="no BatchNorm layer .* nothing to observe") as caught:
        context = bnstats.observe(nn.Linear(2, 2))
    assert caught[0].filename == __file__
    with context as seen:
        pass
    assert len(seen.stats()) == 0
    with pytest.warns(BnstatsWarning, match="that include chooses, of 3"):
        bnstats.observe(networks.network(), lambda *_: False)


def test_statistics_of_two_observations_merge_and_save(tmp_path):
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    parts = []
    for half in (data[:2], data[2:]):
        with bnstats.observe(model) as seen:
            for x in half:
                model(x)
        seen.stats().save(tmp_path / "part.npz")
        parts.append(bnstats.PopulationStats.load(tmp_path / "part.npz"))
    assert_stats_of(parts[0].merge(parts[1]), observed_inputs(model, data))


def test_every_family_is_observed_in_training():
    model = nn.Sequential(*(f.make(1, 3) for f in FAMILIES))
    data = batches((8, 3))
    with bnstats.observe(model) as seen:
        for x in data:
            model(x)
    assert [stats.count for stats in seen.stats().values()] == [40] * len(FAMILIES)


def test_padding_does_not_count_under_a_mask():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), bnstats.EMABatchNorm1d(3)).eval()
    x, valid = torch.randn(4, 2, 6), torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    with bnstats.observe(model) as seen, bnstats.masked(model, valid), torch.no_grad():
        model(x)
    values = model[0](x).double().movedim(1, -1)[valid]
    assert_stats_of(seen.stats(), {"1": values})


def test_on_a_device_it_waits_for_no_value(monkeypatch):
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    collector = "bnstats.recomputation.collector.Collector"
    monkeypatch.setattr(f"{collector}.end_batch", Collector.end_batch_unasked)
    with bnstats.observe(model) as seen:
        for x in (data[0], torch.full((2, 2, 8, 8), torch.nan), *data[1:]):
            model(x)
    with pytest.warns(BnstatsWarning, match="1 of 5 forwards had values that are not finite"):
        assert_stats_of(seen.stats(), observed_inputs(model, data))


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copying", [copied, pickled])
def test_what_is_copied_from_a_model_that_is_observed_is_not(copying):
    """A teacher of averaged weights, or a whole model that a trainer saves."""
    model, data = without_dropout(networks.trained()).eval(), networks.uneven()
    with bnstats.observe(model) as seen, bnstats.record_batch_stats(model) as record:
        model(data[0])
        other, layer = copying(model), copying(model[1])
        other.train()(data[1])
        layer(model[0](data[1]))
    assert seen.num_batches == 1
    assert_stats_of(seen.stats(), observed_inputs(model, data[:1]))
    assert not any(len(one.iterations) for one in record.values())
    assert_stats_of(*observations_of(other.eval(), data))


def observations_of(model, data):
    with bnstats.observe(model) as seen:
        for x in data:
            model(x)
    return seen.stats(), observed_inputs(model, data)


def test_a_forward_that_returns_none_counts_while_an_earlier_error_is_handled():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            self.output = self.norm(x)

    model = Storing()
    with bnstats.observe(model) as seen:
        try:
            raise StopIteration
        except StopIteration:
            model(torch.randn(8, 3))
    assert seen.stats()["norm"].count == 8


def test_an_error_that_was_handled_in_a_forward_is_not_kept():
    class HandledError(Exception):
        pass

    model, kept = nn.BatchNorm1d(3), None
    with bnstats.observe(model) as seen:
        try:
            raise HandledError
        except HandledError as error:
            kept = weakref.ref(error)
            model(torch.randn(8, 3))
    gc.collect()
    assert kept() is None
    assert seen.stats()[""].count == 8
