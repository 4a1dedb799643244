"""The exact fixed point in constant memory, with as few forwards as can be."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import cases
from bnstats.errors import (
    BnstatsWarning,
    InvalidValueError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from memory import count_new_values
from networks import assert_untouched, snapshot, trained, uneven
from test_layerwise import Branching, assert_fixed_point, signed


def measure(model, data, **options):
    return bnstats.measure_population_stats(model, data, method="sweeps", **options)


def recompute(model, data, **options):
    return bnstats.recompute_population_stats(model, data, method="sweeps", **options).after


@pytest.mark.parametrize("correction", [0, 1])
def test_evaluation_sees_exactly_the_statistics_it_normalizes_with(correction):
    model, data = trained(), uneven()
    stats = recompute(model, data, correction=correction)
    assert_fixed_point(model, data, stats, correction)
    assert {s.num_batches for s in stats.values()} == {4}


def test_the_same_call_gives_the_same_bits():
    model, data = trained(), uneven()
    a, b = measure(model, data), measure(model, data)
    for name in a:
        assert torch.equal(a[name].var, b[name].var)
        assert torch.equal(a[name].mean_stderr, b[name].mean_stderr)


class ReadsFirst(nn.Module):
    """Reads a layer's running variance before the layer runs, as torch.ao's ConvBn2d does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        scaled = x / (self.first.running_var + 1e-5).sqrt()
        return self.second(scaled) + self.first(x)


def test_statistics_that_a_model_reads_before_their_layer_runs_are_the_final_ones():
    model, data = ReadsFirst(), [3 * torch.randn(16, 3) + i for i in range(4)]
    stats = recompute(model, data)
    expected = torch.cat(data).double() / (stats["first"].var + 1e-5).sqrt()
    torch.testing.assert_close(stats["second"].var, expected.var(0))


class Retrying(nn.Module):
    """Catches whatever a layer raises, and calls it again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.first(x)
        try:
            return self.second(x)
        except BaseException:
            return self.second(x)


def test_a_model_that_catches_everything_counts_each_batch_once():
    stats = measure(Retrying(), [torch.randn(8, 3) for _ in range(5)])
    assert stats["second"].count == 40


@pytest.mark.parametrize("by", ["hook", "forward"])
def test_what_a_model_undoes_after_a_forward_is_undone(by):
    # As sharded and offloaded modules do: one gathers, or loads, before, and gives back after.
    model, data, loaded = trained(), uneven(), []
    own = model.forward

    def forward(x):
        loaded.append(1)
        y = own(x)
        loaded.pop()
        return y

    if by == "forward":
        model.forward = forward
    else:
        model.register_forward_pre_hook(lambda *_: loaded.append(1))
        model.register_forward_hook(lambda *_: loaded.pop() and None)
    assert_fixed_point(model, data, recompute(model, data), 1)
    assert loaded == []


class Counting:
    """A loader that counts how often it is read, and a model's part that counts its forwards."""

    def __init__(self, data):
        self.data, self.reads = data, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.data)


def count_calls(model):
    calls = []
    for module in model.modules():
        if not [*module.children()]:
            # Not one after it: forwards are not cut short where something comes after them.
            module.register_forward_pre_hook(lambda module, *_: calls.append(module))
    return calls


def test_a_forward_ends_where_there_is_nothing_more_to_be_seen():
    model, loader = trained(), Counting(uneven())
    calls = count_calls(model)
    measure(model, loader)
    assert loader.reads == 3
    # The survey runs all 9 modules and sees layer 1; then layer 5, then layer 8, which begin last.
    assert len(calls) == 4 * (9 + 6 + 9)


class Parallel(nn.Module):
    """Two branches of two layers each, and a layer on their sum."""

    def __init__(self, make=nn.BatchNorm1d):
        super().__init__()
        self.a1, self.a2, self.b1, self.b2, self.last = (make(3) for _ in range(5))

    def forward(self, x):
        return self.last(self.a2(self.a1(x).relu()) + self.b2(self.b1(x * x).relu_()))


# The moments of large inputs are compared on the host, which is no use of them by the model.
@pytest.mark.parametrize(
    ("make", "shape"), [(nn.BatchNorm1d, (20, 3)), (nn.BatchNorm2d, (20, 3, 48, 48))]
)
def test_layers_that_do_not_depend_on_each_other_share_a_sweep(make, shape):
    model, loader = Parallel(make), Counting(list(torch.randn(4, *shape)))
    stats = recompute(model, loader)
    assert loader.reads == 3
    assert_fixed_point(model, loader.data, stats)


class Shared(nn.Module):
    """One layer called twice, the second time on what came of the first, and layers around."""

    def __init__(self, bend=torch.sin):
        super().__init__()
        self.bend = bend
        self.before, self.shared, self.between, self.after = (nn.BatchNorm1d(3) for _ in range(4))

    def forward(self, x):
        y = self.shared(self.before(x) * 2).relu()
        y = self.shared(self.between(self.bend(y)) + x)
        return self.after(y.sin())


# Under the square each sweep throws the statistics to the other side of the fixed point.
@pytest.mark.parametrize("bend", [torch.sin, torch.square])
def test_layers_that_depend_on_each_other_are_repeated_until_nothing_moves(bend):
    model, data = Shared(bend), [torch.randn(20, 3) * (1 + i) for i in range(4)]
    stats = recompute(model, data)
    assert_fixed_point(model, data, stats)
    assert stats["shared"].count == 2 * stats["after"].count


def test_two_independent_calls_of_a_layer_need_no_repetition():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twin, self.last = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            return self.last(self.twin(x.relu()) + self.twin(x.cos()))

    model, loader = Twins(), Counting(list(torch.randn(4, 20, 3)))
    stats = recompute(model, loader)
    assert loader.reads == 3
    assert stats["twin"].count == 160
    assert_fixed_point(model, loader.data, stats)


@pytest.mark.parametrize("order", [["first", "detour", "last"], ["first", "last", "detour"]])
def test_a_layer_that_only_some_batches_reach_is_completed_before_those_after_it(order):
    model, data = Branching(order), signed([-1, -1, 1, -1, 1])
    stats = recompute(model, data)
    assert {n: s.num_batches for n, s in stats.items()} == {"first": 5, "detour": 2, "last": 5}
    assert_fixed_point(model, data, stats)


def test_layers_in_different_orders_are_repeated_until_nothing_moves():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.b(self.a(x).exp()) if x[0, 0] > 0 else self.a(self.b(x).exp())

    model, data = Either(), signed([1, -1, -1])
    assert_fixed_point(model, data, recompute(model, data))


def test_what_never_comes_to_rest_is_a_warning_that_names_the_layers():
    class Anew:
        """Other data in each reading."""

        def __iter__(self):
            return iter(torch.randn(2, 8, 3))

    with pytest.warns(BnstatsWarning, match=r"still changed by .*'shared', 'between'"):
        measure(Shared(), Anew())


def test_memory_does_not_grow_with_the_number_of_batches():
    calls, alive = itertools.count(), {}
    values_alive = count_new_values()

    def forward(model, batch):
        if (call := next(calls)) in (2, 7, 10, 15):  # to look at every object takes a second
            alive[call] = values_alive()
        model(batch)

    measure(Parallel(), [torch.randn(4, 3)] * 8, forward=forward)
    assert alive[2] == alive[7]
    assert alive[10] == alive[15]


def test_a_tolerance_is_met_by_every_layer_and_ends_each_sweep():
    model, data = trained(), list(torch.randn(300, 6, 2, 8, 8))
    stats = measure(model, data, tolerance=0.1)
    for s in stats.values():
        assert (s.mean_stderr / s.var.sqrt()).square().mean().sqrt() <= 0.1
        assert s.num_batches < 150


def test_bad_batches_raise_or_are_skipped():
    model, data = trained(), uneven()
    good = measure(model, data)
    bad = torch.full_like(data[0], torch.nan)
    before = snapshot(model)
    with pytest.raises(NonFiniteStatisticsError, match=r"batch 1 .*3 layers"):
        measure(model, [data[0], bad, *data[1:]])
    assert_untouched(model, before)
    stats = measure(model, [data[0], bad, *data[1:], bad], on_nonfinite="skip")
    assert stats.num_skipped == 2
    for name in good:
        assert torch.equal(stats[name].var, good[name].var)


def test_a_loader_that_can_be_read_once_is_refused():
    for loader in (iter(uneven()), (x for x in uneven())):
        with pytest.raises(InvalidValueError, match=r"again and again.*can be read once"):
            measure(trained(), loader)

    class Once:
        def __init__(self):
            self.batches = iter(uneven())

        def __iter__(self):
            return self.batches

    with pytest.raises(InvalidValueError, match=r"gave 4 batches .* none when read again"):
        measure(trained(), Once())
    with pytest.raises(InvalidValueError, match="expected at least one batch"):
        measure(trained(), [])


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_whatever_is_raised_in_a_later_sweep_leaves_the_model_as_it_was(error):
    class Failing:
        reads = 0

        def __iter__(self):
            self.reads += 1
            yield from uneven()
            if self.reads == 3:
                raise error

    model = trained()
    before = snapshot(model)
    with pytest.raises(type(error)):
        bnstats.recompute_population_stats(model, Failing(), method="sweeps")
    assert_untouched(model, before)


def test_too_few_values_name_the_layer():
    with pytest.raises(TooFewValuesError, match="layer '' saw 1 value"):
        measure(nn.BatchNorm1d(2), [torch.randn(1, 2)])


def test_options_are_honoured(capsys):
    model, data = trained(), cases.batches((8, 2, 8, 8), 6)
    stats = measure(
        model,
        [{"x": x} for x in data],
        forward=lambda model, batch: model(batch["x"]),
        include=lambda name, _: name != "1",
        max_batches=3,
        progress=True,
    )
    assert {n: s.num_batches for n, s in stats.items()} == {"5": 3, "8": 3}
    assert "2/2" in capsys.readouterr().err


def test_a_layer_never_reached_is_left_alone():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "spare": nn.BatchNorm1d(3)})
    with pytest.warns(BnstatsWarning, match="'spare'"):
        stats = measure(model, [torch.randn(5, 3)], forward=lambda model, x: model["used"](x))
    np.testing.assert_equal([*stats], ["used"])


def test_a_layer_that_only_the_first_reading_reaches_is_told_so():
    class Draws:
        """Takes the detour in its first reading alone."""

        num_reads = 0

        def __iter__(self):
            self.num_reads += 1
            return iter(signed([-1, 1 if self.num_reads == 1 else -1]))

    model = Branching(["first", "detour", "last"])
    model.spare = nn.BatchNorm1d(3)
    with pytest.warns(BnstatsWarning) as caught:
        stats = measure(model, Draws())
    assert [*stats] == ["first", "last"]
    missed, unseen = (str(warning.message) for warning in caught)
    assert "read first, and none did when it was read again" in missed
    assert "'detour'" in missed
    assert "layerwise" in missed
    assert unseen == "no batch reached these layers, which keep their statistics: 'spare'"


@pytest.mark.parametrize(
    "leave",
    [
        lambda y: torch.from_numpy(np.exp(y.numpy())),
        lambda y: torch.tensor(y.exp().tolist()),
        lambda y: torch.arange(3.0).expand(len(y), 3) * y.exp().mean().item(),
    ],
    ids=["numpy", "lists", "a number"],
)
def test_data_that_passes_through_the_host_is_followed(leave):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x):
            return self.last(self.second(leave(self.first(x)) + x).relu())

    model, data = Model(), [torch.randn(20, 3) * (1 + i) for i in range(4)]
    assert_fixed_point(model, data, recompute(model, data))
