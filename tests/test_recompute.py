"""The pass over data after training: right numbers, and a transaction whatever happens."""

import copy
import threading
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import bnstats
import cases
import oracles
from bnstats.errors import (
    BnstatsWarning,
    InvalidTypeError,
    InvalidValueError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)

METHODS = ["pooled", "batch_average", "ema"]


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def trained():
    model = network()
    for x in cases.batches((4, 2, 8, 8), 3):
        model(x)
    return model


def uneven(dtype=torch.float32):
    return [x[: 8 - 2 * i] for i, x in enumerate(cases.batches((8, 2, 8, 8), 4, dtype=dtype))]


def snapshot(model):
    """Everything that a failed recalibration must leave alone, with the tensors' identities."""
    return (
        {
            key: (id(value), value.clone())
            for key, value in model.state_dict(keep_vars=True).items()
        },
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [(m.momentum, m.eps) for m in model.modules() if hasattr(m, "momentum")],
    )


def assert_untouched(model, before):
    tensors, *rest = snapshot(model)
    assert rest == [*before[1:]]
    assert tensors.keys() == before[0].keys()
    for key, (identity, value) in tensors.items():
        assert identity == before[0][key][0], key
        assert torch.equal(value.nan_to_num(9.5), before[0][key][1].nan_to_num(9.5)), key


def inputs_in_training(model, data):
    """What each BatchNorm sees when batches are normalized by themselves and dropout is off."""
    model = copy.deepcopy(model).eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            seen[name] = []
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append(args[0].detach().double().numpy())
            )
    for x in data:
        model(x)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_those_of_the_definition_uneven_batches_included(method):
    model, data = trained(), uneven()
    seen = inputs_in_training(model, data)
    result = bnstats.recompute_population_stats(model, data, method=method)
    for name, batches in seen.items():
        mean, var = {
            "pooled": lambda b: oracles.mean_var(b),
            "batch_average": lambda b: oracles.batch_average(b),
            "ema": lambda b: oracles.exponential(b, 0.1, debias=True, pooled=False),
        }[method](batches)
        layer, stats = model.get_submodule(name), result.after[name]
        # float32 forwards; normalization with a rounded batch mean differs in the last digits.
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.var, var, rtol=1e-4, atol=1e-6)
        assert stats.count == sum(len(oracles.values(b)) for b in batches)
        assert stats.num_batches == len(batches)
        assert torch.equal(layer.running_mean, stats.mean.float())
        assert torch.equal(layer.running_var, stats.var.float())


def test_ema_starts_from_the_first_batch_and_forgets_the_layers_own_average():
    model, x = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(50, 2)
    model[0].running_mean.fill_(100)
    result = bnstats.recompute_population_stats(model, [x], method="ema")
    np.testing.assert_allclose(result.after["0"].mean, x.double().mean(0), atol=1e-7)


def test_pooled_is_the_same_for_any_split_of_the_first_layers_data():
    x = torch.randn(60, 3) * 3 + 1
    whole = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x])
    parts = bnstats.measure_population_stats(nn.BatchNorm1d(3), x.split([1, 19, 2, 38]))
    torch.testing.assert_close(parts[""].mean, whole[""].mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[""].var, whole[""].var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("correction", [0, 1])
def test_correction_chooses_the_divisor(correction):
    x = torch.randn(10, 3)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x], correction=correction)
    torch.testing.assert_close(stats[""].var, x.double().var(0, correction=correction))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bits(method):
    model, data = trained(), uneven()
    a, b = (bnstats.measure_population_stats(model, data, method=method) for _ in range(2))
    for name in a:
        assert torch.equal(a[name].mean, b[name].mean)
        assert torch.equal(a[name].var, b[name].var)


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
def test_whatever_is_raised_leaves_the_model_as_it_was(error, where):
    # torch's update_bn leaves reset statistics and momentum None behind.
    model, data = trained(), uneven()
    if where == "model":
        model.insert(4, Failing(error, 2))
    if where == "last layer":
        model.append(Failing(error, 0))
    for i, module in enumerate(model):
        module.train(i % 2 == 0)
    before = snapshot(model)

    def loader():
        yield from data[:2]
        raise error

    def forward(model, batch):
        model(batch)
        raise error

    with pytest.raises(type(error)):
        bnstats.recompute_population_stats(
            model,
            loader() if where == "loader" else data,
            forward=forward if where == "forward" else None,
        )
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
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
    good = bnstats.measure_population_stats(model, data, method=method)
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


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, None],
        lambda x: Pair(x, 0),
        lambda x: ((x, 1), 2),
        lambda x: {"input": x},
        lambda x: UserDict(input=x),
        lambda x: [{"input": x}, "labels"],
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "nested", "dict", "mapping", "dict in list"],
)
def test_batches_come_in_many_forms(wrap):
    x = torch.randn(20, 3)
    model = nn.Sequential(nn.BatchNorm1d(3))
    stats = bnstats.measure_population_stats(model, [wrap(part) for part in x.split(5)])
    torch.testing.assert_close(stats["0"].mean, x.double().mean(0))


def test_forward_serves_every_other_batch_and_autocast():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(20, 3)
    seen = []

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(model(batch.payload).dtype)

    class Batch:
        payload = x

    stats = bnstats.measure_population_stats(model, [Batch()], forward=forward)
    assert seen == [torch.bfloat16]
    assert stats["1"].count == 20


def test_a_dataloader_serves():
    x = torch.randn(21, 3)
    loader = DataLoader(TensorDataset(x, torch.zeros(21)), batch_size=4)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader)
    assert (stats[""].count, stats[""].num_batches) == (21, 6)
    torch.testing.assert_close(stats[""].var, x.double().var(0))


def test_batches_of_one_value_per_channel_do_not_raise():
    # https://github.com/pytorch/pytorch/issues/1381
    x = torch.randn(9, 3)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), x.split(1))
    torch.testing.assert_close(stats[""].var, x.double().var(0))


def test_too_few_values_for_a_variance_are_an_error_that_names_the_layer():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(1, 3)
    before = snapshot(model)
    with pytest.raises(TooFewValuesError, match="layer '0' saw 1 value"):
        bnstats.recompute_population_stats(model, [x])
    with pytest.raises(TooFewValuesError, match="layer '0' saw 1 value per channel in batch 1"):
        bnstats.recompute_population_stats(model, [torch.randn(4, 3), x], method="batch_average")
    assert_untouched(model, before)


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(2 * x + 1)

    x = torch.randn(20, 3)
    stats = bnstats.measure_population_stats(Twice(), x.split(5))["bn"]
    both = torch.cat([x, 2 * x + 1]).double()
    assert (stats.count, stats.num_batches) == (40, 4)
    np.testing.assert_allclose(stats.mean, both.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.var, both.var(0), rtol=1e-6)


def test_a_layer_never_called_is_named_and_left_alone():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    model.spare.running_mean.fill_(7)
    with pytest.warns(BnstatsWarning, match="'spare'"):
        result = bnstats.recompute_population_stats(model, [torch.randn(8, 3)])
    assert [*result.after] == ["used"]
    assert (model.spare.running_mean == 7).all()


def test_a_layer_that_only_some_batches_reach_counts_those():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.rare = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.rare(self.bn(x)) if x[0, 0] > 0 else self.bn(x)

    data = [torch.randn(6, 2).abs() * sign for sign in (1, -1, 1, -1, -1)]
    for method in METHODS:
        stats = bnstats.measure_population_stats(Sometimes(), data, method=method)
        assert (stats["bn"].num_batches, stats["rare"].num_batches) == (5, 2)
        assert stats["rare"].count == 12


def test_include_chooses_and_the_others_normalize_as_in_evaluation():
    model, data = trained(), uneven()
    before = snapshot(model)[0]
    result = bnstats.recompute_population_stats(
        model, data, include=lambda name, module: name == "5" and module.num_features == 3
    )
    assert [*result.after] == ["5"]
    for key in ("1.running_mean", "8.running_var"):
        assert torch.equal(model.state_dict()[key], before[key][1])
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        x = torch.cat([evaluated[:5](x) for x in data]).double()
    np.testing.assert_allclose(result.after["5"].mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_max_batches_reads_no_more_than_so_many():
    read = []

    def loader():
        for x in torch.randn(10, 4, 3):
            read.append(x)
            yield x

    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader(), max_batches=4)
    assert stats[""].num_batches == len(read) == 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        DataParallel,
        AveragedModel,
        lambda m: torch.compile(DataParallel(m), backend="eager"),
    ],
    ids=["compile", "DataParallel", "AveragedModel", "both"],
)
def test_wrappers_are_seen_through(wrap):
    model = trained()
    wrapped = wrap(model)
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else model
    result = bnstats.recompute_population_stats(wrapped, uneven())
    assert [*result.after] == ["1", "5", "8"]
    result.after.apply_to(network())
    assert torch.equal(inner[1].running_mean, result.after["1"].mean.float())


def test_distributed_data_parallel_is_seen_through(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = trained()
        result = bnstats.recompute_population_stats(DistributedDataParallel(model), uneven())
        assert [*result.after] == ["1", "5", "8"]
        assert torch.equal(model[8].running_var, result.after["8"].var.float())
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_parts_inside_are_seen_through_and_still_observed():
    # Compiled code does not notice hooks that are added later.
    model = nn.Sequential(torch.compile(network()[:2], backend="eager"), nn.ReLU())
    x = torch.randn(4, 2, 8, 8)
    model(x)
    model[1].compile(backend="eager")
    stats = bnstats.measure_population_stats(model, [x])
    assert [*stats] == ["0.1"]
    assert stats["0.1"].count == 4 * 36
    model(x)


def test_sync_batchnorm_on_cpu_serves():
    x = torch.randn(20, 3, 4)
    stats = bnstats.measure_population_stats(nn.SyncBatchNorm(3), x.split(5))
    torch.testing.assert_close(stats[""].mean, x.double().mean((0, 2)), rtol=1e-6, atol=1e-7)


def test_a_subclass_with_a_forward_of_its_own_serves():
    class BatchNormRelu(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    x = torch.randn(8, 3, 4, 4)
    stats = bnstats.measure_population_stats(nn.Sequential(BatchNormRelu(3), BatchNormRelu(3)), [x])
    assert (stats["1"].mean > 0.2).all()


@pytest.mark.parametrize("family", cases.FAMILIES, ids=lambda f: f.name)
def test_our_layers_serve_and_their_counters_stay(family):
    model = nn.Sequential(family.make(1))
    x = torch.randn(40, 3) + 1
    model(x)
    counters = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    result = bnstats.recompute_population_stats(model, x.split(10))
    assert torch.equal(model[0].running_var, result.after["0"].var.float())
    for key, value in counters.items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_layer_that_keeps_its_statistics_about_zero_says_so_itself():
    class AboutZero(nn.BatchNorm1d):
        def statistics_about_zero(self):
            return True

    x = torch.randn(40, 3) + 2
    model = nn.Sequential(AboutZero(3))
    bnstats.recompute_population_stats(model, x.split(10))
    assert (model[0].running_mean == 0).all()
    torch.testing.assert_close(model[0].running_var, x.square().mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_wide_and_keep_their_dtype(dtype):
    model = nn.Sequential(nn.BatchNorm1d(3)).to(dtype)
    x = (torch.randn(200, 3) + 4).to(dtype)
    result = bnstats.recompute_population_stats(model, x.split(50))
    assert model[0].running_mean.dtype == dtype
    torch.testing.assert_close(result.after["0"].var, x.double().var(0), rtol=1e-6, atol=0)


def test_layers_without_running_statistics_are_no_concern():
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.BatchNorm1d(3)
    )
    with torch.no_grad():
        assert [*bnstats.measure_population_stats(model, [torch.randn(4, 3, 5)])] == ["2"]


def test_shared_layers_are_one_layer():
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    stats = bnstats.measure_population_stats(model, [torch.randn(8, 3)])
    assert {name: s.count for name, s in stats.items()} == {"0": 16}


def test_no_batchnorm_is_a_warning_and_an_empty_result():
    with pytest.warns(BnstatsWarning, match="Linear has no BatchNorm layer"):
        result = bnstats.recompute_population_stats(nn.Linear(2, 2), [torch.randn(3, 2)])
    assert len(result.after) == 0
    assert "0 BatchNorm layers" in str(result)
    result.undo()
    with pytest.warns(BnstatsWarning, match="that include chooses"):
        bnstats.measure_population_stats(network(), uneven(), include=lambda *_: False)


def test_progress_shows_a_bar_only_when_asked(capsys):
    data = [torch.randn(4, 3)] * 3
    bnstats.measure_population_stats(nn.BatchNorm1d(3), data)
    assert capsys.readouterr().err == ""
    bnstats.measure_population_stats(nn.BatchNorm1d(3), data, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_batches():
    # The state is a few float64 per channel: what is allocated between batches stays the same.
    import gc

    def tensors_alive(batches):
        counts = []

        def forward(model, batch):
            model(batch)
            gc.collect()
            alive = (o for o in gc.get_objects() if type(o) is torch.Tensor)
            counts.append(sum(t.numel() for t in alive))

        x = torch.randn(4, 3)
        bnstats.measure_population_stats(nn.BatchNorm1d(3), [x] * batches, forward=forward)
        return counts

    counts = tensors_alive(8)
    assert counts[2] == counts[-1]


def test_no_thread_is_left_behind():
    before = threading.active_count()
    bnstats.measure_population_stats(nn.BatchNorm1d(3), [torch.randn(4, 3)])
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": print}, InvalidTypeError, "expected a torch.nn.Module, got builtin_function"),
        ({"loader": 5}, InvalidTypeError, "expected an iterable of batches.*got int"),
        ({"loader": torch.randn(4, 3)}, InvalidTypeError, r"got Tensor.*\[batch\]"),
        ({"loader": {"x": torch.randn(4, 3)}}, InvalidTypeError, "got dict"),
        ({"loader": []}, InvalidValueError, "expected at least one batch, got none"),
        ({"loader": iter(())}, InvalidValueError, "an iterator that was read before"),
        ({"loader": [[]]}, InvalidValueError, "empty sequence"),
        ({"loader": [object()]}, InvalidTypeError, "got object; pass forward="),
        ({"method": "mean"}, InvalidValueError, "expected one of pooled.*got 'mean'"),
        ({"max_batches": 0}, InvalidValueError, "max_batches: expected 1 or more, got 0"),
        ({"max_batches": 2.0}, InvalidTypeError, "max_batches: expected an int"),
        ({"correction": 2}, InvalidValueError, "correction: expected 1"),
        ({"on_nonfinite": "ignore"}, InvalidValueError, '"raise" or "skip", got \'ignore\''),
        ({"include": "bn1"}, InvalidTypeError, "include: expected a callable or None, got str"),
        ({"forward": 3}, InvalidTypeError, "forward: expected a callable or None, got int"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())},
            InvalidTypeError,
            r"layer '1' \(LazyBatchNorm1d\) is lazy",
        ),
    ],
)
def test_misuse_says_what_was_expected_and_what_came(arguments, error, says):
    arguments = {"model": nn.BatchNorm1d(3), "loader": [torch.randn(4, 3)], **arguments}
    for function in (bnstats.recompute_population_stats, bnstats.measure_population_stats):
        with pytest.raises(error, match=says):
            function(
                arguments["model"],
                arguments["loader"],
                **{k: v for k, v in arguments.items() if k not in ("model", "loader")},
            )


def test_batches_move_to_the_models_device_at_any_depth(cuda):
    model, x = nn.Sequential(nn.BatchNorm1d(3)).to(cuda), torch.randn(20, 3)
    seen = []

    def forward(model, batch):
        seen.append(batch["a"][0].device.type)
        model(batch["a"][0])

    stats = bnstats.measure_population_stats(model, [{"a": (x,)}], forward=forward)
    assert seen == ["cuda"]
    assert stats["0"].mean.device.type == "cpu"
    torch.testing.assert_close(stats["0"].var, x.double().var(0), rtol=1e-5, atol=0)


def test_a_device_may_be_named():
    seen = []

    def forward(model, batch):
        seen.append(batch.device.type)
        model(torch.randn(4, 3))

    bnstats.measure_population_stats(
        nn.BatchNorm1d(3), [torch.randn(4, 3)], device="meta", forward=forward
    )
    assert seen == ["meta"]
