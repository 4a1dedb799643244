"""All batches together, layer by layer: exact, the same bits twice, and never hanging."""

import _thread
import copy
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
import cases
import oracles
from bnstats.errors import (
    InvalidTypeError,
    InvalidValueError,
    MemoryLimitError,
    NonFiniteStatisticsError,
    RepeatedLayerError,
    TooFewValuesError,
)
from networks import assert_untouched, mix_modes, network, snapshot, trained, uneven


@pytest.fixture(autouse=True)
def no_thread_is_left_and_their_number_is_as_before():
    before, intra = threading.enumerate(), torch.get_num_threads()
    yield
    assert [t for t in threading.enumerate() if t.name.startswith("bnstats")] == []
    assert torch.get_num_threads() == intra
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [intra]
    assert set(before) <= set(threading.enumerate())


def inputs_in_evaluation(model, data):
    """What each BatchNorm sees when the model evaluates the data."""
    model = copy.deepcopy(model).eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
            )
    with torch.no_grad():
        for x in data:
            model(x)
    return seen


def assert_fixed_point(model, data, stats, correction=1):
    for name, inputs in inputs_in_evaluation(model, data).items():
        mean, var = oracles.mean_var(inputs, correction)
        # Relative to float32 activations.
        np.testing.assert_allclose(stats[name].mean, mean, atol=2e-6 * var.max() ** 0.5)
        np.testing.assert_allclose(stats[name].var, var, rtol=1e-5)


def measure(model, data, **options):
    return bnstats.measure_population_stats(model, data, method="layerwise", **options)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_evaluation_sees_exactly_the_statistics_it_normalizes_with(count, correction):
    model = trained()
    data = [x[: 8 - i] for i, x in enumerate(cases.batches((8, 2, 8, 8), count))]
    result = bnstats.recompute_population_stats(
        model, data, method="layerwise", correction=correction
    )
    assert_fixed_point(model, data, result.after, correction)
    assert result.after["1"].num_batches == count


def test_two_runs_give_the_same_bits_whatever_order_the_batches_come_in():
    class Jitter(nn.Module):
        def forward(self, x):
            time.sleep(float(torch.rand(())) * 0.01)
            return x

    model, data = trained(), uneven() * 2
    model.insert(2, Jitter())
    a, b = measure(model, data), measure(model, data)
    for name in a:
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            assert torch.equal(getattr(a[name], field), getattr(b[name], field))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_serves(threads):
    model, data = trained(), uneven()
    expected = measure(model, data)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stats = measure(model, data)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in stats:
        torch.testing.assert_close(stats[name].var, expected[name].var, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (2, 3)])
def test_no_more_forwards_compute_than_one_beyond_the_threads_that_are_allowed(threads, most):
    class Counted(nn.Module):
        running, largest, lock = 0, 0, threading.Lock()

        def forward(self, x):
            with self.lock:
                self.running += 1
                self.largest = max(self.largest, self.running)
            time.sleep(0.02)
            with self.lock:
                self.running -= 1
            return x

    model, counted, before = trained(), Counted(), torch.get_num_threads()
    model.insert(0, counted)
    in_the_loader = []

    def loader():
        for x in uneven() * 2:
            in_the_loader.append(torch.get_num_threads())
            yield x

    torch.set_num_threads(threads)
    try:
        measure(model, loader())
    finally:
        torch.set_num_threads(before)
    assert counted.largest == most
    # The thread that leads has one of its own as soon as forwards run beside it.
    assert in_the_loader[most:] == [1] * (len(in_the_loader) - most)


def test_the_layers_see_what_the_callers_thread_has_set():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(
                (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), x.dtype, self.training)
            )
            return x

    model = nn.Sequential(nn.Linear(3, 3), Probe(), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure(model, [torch.randn(9, 3)] * 3)
    assert seen == [(False, True, torch.bfloat16, False)] * 3
    with torch.inference_mode():
        measure(model, [torch.randn(9, 3)] * 3)


def test_compiled_parts_are_seen_through():
    model = nn.Sequential(torch.compile(network()[:2], backend="eager"), nn.ReLU())
    data = list(torch.randn(3, 4, 2, 8, 8))
    model(data[0])
    stats = measure(model, data)
    assert stats["0.1"].count == 3 * 4 * 36


def test_forward_include_max_batches_and_progress_are_honoured(capsys):
    model, data = trained(), uneven()
    calls = []

    def forward(model, batch):
        calls.append(batch["x"])
        model(batch["x"])

    stats = measure(
        model,
        ({"x": x} for x in data),
        forward=forward,
        include=lambda name, _: name != "1",
        max_batches=3,
        progress=True,
    )
    assert len(calls) == 3
    assert [*stats] == ["5", "8"]
    assert "2/2" in capsys.readouterr().err


class Branching(nn.Module):
    """Batches whose first value is positive take the detour; the order of the layers is given."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            self.add_module(name, nn.BatchNorm1d(2))

    def forward(self, x):
        y = self.first(x)
        if x[0, 0] > 0:
            y = self.detour(y).relu()
        return self.last(y)


def signed(signs):
    return [torch.randn(6, 2).abs() * sign + torch.randn(6, 2) / 9 for sign in signs]


def test_a_layer_that_only_some_batches_reach_is_completed_with_those():
    model, data = Branching(["first", "detour", "last"]), signed([1, -1, 1, -1, -1])
    result = bnstats.recompute_population_stats(model, data, method="layerwise")
    batches = {name: s.num_batches for name, s in result.after.items()}
    assert batches == {"first": 5, "detour": 2, "last": 5}
    assert_fixed_point(model, data, result.after)


def test_a_batch_that_comes_late_is_normalized_and_does_not_count():
    # Waited for equally long, `last` is named first and goes first.
    model, data = Branching(["first", "last", "detour"]), signed([1, -1, 1, -1, -1])
    stats = measure(model, data)
    assert {n: s.num_batches for n, s in stats.items()} == {"first": 5, "last": 3, "detour": 2}


def test_two_layers_in_different_orders_do_not_wait_for_each_other():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.b(self.a(x)) if x[0, 0] > 0 else self.a(self.b(x))

    stats = measure(Either(), signed([1, -1, -1]))
    assert {name: s.num_batches for name, s in stats.items()} == {"a": 1, "b": 3}


def test_a_batch_may_end_before_any_layer():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.bn(x) if x[0, 0] > 0 else x

    assert measure(Sometimes(), signed([-1, 1, -1, 1]))["bn"].num_batches == 2


def test_a_layer_called_twice_is_named_with_the_remedy():
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.ReLU(), layer)
    before = snapshot(model)
    with pytest.raises(RepeatedLayerError, match=r"layer '1' .*more than once.*sweeps"):
        measure(model, [torch.randn(5, 3)] * 4)
    assert_untouched(model, before)


class FailingAt(nn.Module):
    """Raises for batches that begin with 77."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if (x.flatten()[0] == 77).item():
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["loader", "before", "between", "after"])
def test_whatever_is_raised_ends_every_thread_and_leaves_the_model_as_it_was(where, error):
    class Between(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if type(self).calls == 3:
                raise error
            return x

    model, data = trained(), uneven()
    at = {"before": 0, "between": 3, "after": len(model)}
    if where in at:
        model.insert(at[where], Between())
    mix_modes(model)
    before = snapshot(model)

    def loader():
        yield from data
        if where == "loader":
            raise error

    with pytest.raises(type(error)):
        bnstats.recompute_population_stats(model, loader(), method="layerwise")
    assert_untouched(model, before)


def test_of_several_failing_batches_the_first_speaks():
    class Numbered(nn.Module):
        def forward(self, x):
            raise ValueError(f"batch {int(x[0, 0])}")

    for _ in range(5):
        with pytest.raises(ValueError, match="batch 0"):
            measure(
                nn.Sequential(Numbered(), nn.BatchNorm1d(2)), list(torch.arange(8.0).view(4, 1, 2))
            )


@pytest.fixture
def ctrl_c_raises():
    """Where SIGINT is ignored when the tests start, as under nohup, nothing would be raised."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_while_the_owner_waits_ends_every_thread():
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if type(self).calls == 3:
                _thread.interrupt_main()
            time.sleep(0.02)
            return x

    model, data = trained(), uneven() * 3
    model.insert(2, Interrupting())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        measure(model, data)
    assert_untouched(model, before)


def test_an_except_exception_in_the_model_does_not_swallow_the_end():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            try:
                return self.bn(x)
            except Exception:
                return x

    model = nn.Sequential(Stubborn(), FailingAt(RuntimeError("bad")), nn.BatchNorm1d(2))

    def loader():
        yield from torch.randn(3, 4, 2)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        measure(model, loader())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_batches_raise_with_their_indices_and_the_layer(value):
    model, data = trained(), uneven()
    data[1][0, 0, 0, 0] = data[2][0, 0, 0, 0] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteStatisticsError, match=r"batch 1, 2 .*layer '1'"):
        measure(model, data)
    assert_untouched(model, before)


def test_bad_batches_skipped_leave_at_the_layer_where_they_are_bad():
    model, data = trained(), uneven()
    good = measure(model, data)
    bad = torch.full_like(data[0], float("nan"))
    stats = measure(model, [data[0], bad, *data[1:], bad], on_nonfinite="skip")
    assert stats.num_skipped == 2
    for name in good:
        assert torch.equal(stats[name].mean, good[name].mean)
        assert torch.equal(stats[name].var, good[name].var)
    with pytest.raises(NonFiniteStatisticsError, match="all 2 batches"):
        measure(model, [bad, bad], on_nonfinite="skip")

    class Overflows(nn.Module):
        def forward(self, x):
            return x * float("inf") if x[0, 0, 0, 0] > 1 else x

    data = [torch.randn(4, 2, 8, 8) for _ in range(5)]
    data[3][0, 0, 0, 0] = 50
    stats = measure(
        nn.Sequential(nn.BatchNorm2d(2), Overflows(), nn.BatchNorm2d(2)),
        data,
        on_nonfinite="skip",
    )
    assert stats["0"].num_batches == 5
    assert stats["2"].num_batches + stats.num_skipped == 5


def test_the_memory_limit_names_layer_bytes_and_remedy():
    model, data = trained(), [torch.randn(4, 2, 8, 8)] * 6
    one = 4 * 4 * 6 * 6 * 4  # batch, channels, rows, columns, bytes: what waits at layer 1
    before = snapshot(model)
    measure(model, data, memory_limit=6 * one)
    for limit in (6 * one - 1, 1):
        with pytest.raises(
            MemoryLimitError, match=rf"layer '1'.* memory_limit={limit:,}; .*sweeps"
        ):
            measure(model, data, memory_limit=limit)
    assert_untouched(model, before)
    with pytest.raises(InvalidValueError, match=r'memory_limit.*"pooled"'):
        bnstats.measure_population_stats(model, data, memory_limit=100)
    with pytest.raises(InvalidTypeError, match="memory_limit: expected an int"):
        measure(model, data, memory_limit=1.5)


def test_a_tolerance_takes_twice_as_many_batches_until_it_is_met():
    read = []

    def loader():
        for x in torch.randn(500, 6, 2, 8, 8):
            read.append(x)
            yield x

    model = trained()
    stats = measure(model, loader(), tolerance=0.1)
    assert len(read) == stats["1"].num_batches
    assert len(read) in (16, 32, 64, 128)
    for s in stats.values():
        assert (s.mean_stderr / s.var.sqrt()).square().mean().sqrt() <= 0.1
    exact = measure(model, read)
    for name in exact:
        assert torch.equal(exact[name].mean, stats[name].mean)
    assert measure(model, read[:11], tolerance=1e-9)["8"].num_batches == 11


def test_too_few_values_are_an_error_that_names_the_layer():
    with pytest.raises(TooFewValuesError, match="layer '' saw 1 value"):
        measure(nn.BatchNorm1d(2), [torch.randn(1, 2)])
    assert measure(nn.BatchNorm1d(2), list(torch.randn(3, 1, 2)))[""].count == 3


def test_about_zero_normalizes_about_zero():
    class AboutZero(nn.BatchNorm1d):
        def statistics_about_zero(self):
            return True

    model = nn.Sequential(AboutZero(2), nn.BatchNorm1d(2))
    data = [torch.randn(5, 2) + 3 for _ in range(3)]
    result = bnstats.recompute_population_stats(model, data, method="layerwise")
    x = torch.cat(data).double()
    np.testing.assert_allclose(result.after["0"].var, x.square().mean(0), rtol=1e-6)
    y = model.eval()[0](x.float()).double()
    np.testing.assert_allclose(result.after["1"].mean, y.detach().mean(0), rtol=1e-5)


def test_hundreds_of_batches_serve():
    stats = measure(network(), list(torch.randn(300, 2, 2, 8, 8)))
    assert stats["8"].num_batches == 300


def test_a_forward_with_threads_of_its_own_is_refused_not_hung():
    def forward(model, batch):
        errors = []

        def run():
            try:
                model(batch)
            except InvalidValueError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise errors[0]

    with pytest.raises(InvalidValueError, match="in a thread that the forward"):
        measure(nn.BatchNorm1d(2), [torch.randn(4, 2)], forward=forward)


def number_in_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_measurements_at_once_leave_the_number_of_threads_as_it_was(first_to_end):
    begun, may_end = ([threading.Event(), threading.Event()] for _ in range(2))

    def run(k):
        def loader():
            yield from torch.randn(6, 4, 3)
            begun[k].set()
            assert may_end[k].wait(20)

        measure(nn.BatchNorm1d(3), loader())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for thread, event in zip(threads, begun, strict=True):
            thread.start()
            assert event.wait(20)  # the second begins while the first is at work
        for k in (first_to_end, 1 - first_to_end):
            may_end[k].set()
            threads[k].join()
        assert (torch.get_num_threads(), number_in_a_new_thread()) == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_a_system_without_more_threads_is_told_with_the_remedy(monkeypatch):
    start, started = threading.Thread.start, []

    def failing(thread):
        if thread.name.startswith("bnstats"):
            if len(started) == 4:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    model = trained()
    before = snapshot(model)
    monkeypatch.setattr(threading.Thread, "start", failing)
    says = r'batch 4 \(counted from 0\).*method="sweeps".*max_batches'
    with pytest.raises(RuntimeError, match=says) as caught:
        measure(model, uneven() * 2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_untouched(model, before)
