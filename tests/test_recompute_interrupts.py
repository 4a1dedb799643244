"""Ctrl-C at any moment, once or several times, leaves the model as it was, and no thread."""

import gc
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

import bnstats
from bnstats.interrupts import Interrupts
from networks import assert_untouched, mix_modes, snapshot, trained, uneven

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


class Pressed(BaseException):
    """What the handler raises; a KeyboardInterrupt would end pytest if it came late."""


@pytest.fixture
def handler():
    """Raises for a signal while `handler.raising`, and counts them."""

    class Handler:
        raising, count = True, 0

        def __call__(self, *_):
            self.count += 1
            if self.raising:
                raise Pressed

    mine, before = Handler(), signal.signal(signal.SIGINT, signal.default_int_handler)
    # What is raised in a callback of the garbage collector is lost; hypothesis has one.
    callbacks = gc.callbacks.copy()
    gc.callbacks.clear()
    signal.signal(signal.SIGINT, mine)
    yield mine
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, before)
    gc.callbacks.extend(callbacks)


class Slow(nn.Module):
    """Keeps a thread of `layerwise` computing while the main one is interrupted."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def slow_model(seconds=0.001):
    model = trained()
    for position in (7, 5, 3, 1, 0):
        model.insert(position, Slow(seconds))
    return model


class Presser(threading.Thread):
    """Presses Ctrl-C so often, the first time so many seconds after `ready` was set."""

    def __init__(self, times, after, apart=0.004):
        super().__init__()
        self.times, self.after, self.apart = times, after, apart
        self.ready = threading.Event()
        self.start()

    def run(self):
        self.ready.wait()
        time.sleep(self.after)
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(self.apart)


@pytest.mark.parametrize("presses", [1, 2, 3])
@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_ctrl_c_at_ten_moments_leaves_the_model_as_it_was_and_no_thread(method, presses, handler):
    model, data = slow_model(), uneven()
    mix_modes(model)
    before = snapshot(model)
    start = time.perf_counter()
    bnstats.measure_population_stats(model, data, method=method)
    whole = time.perf_counter() - start
    for moment in range(10):
        pressing = Presser(presses, after=whole * (moment + 0.5) / 10)
        try:
            try:
                handler.raising = True
                pressing.ready.set()
                bnstats.measure_population_stats(model, data, method=method)
            finally:
                handler.raising = False  # an assignment: no handler runs before it
        except Pressed:
            pass
        pressing.join()
        # A thread that still ran would change the counters of layers in training mode.
        assert [t for t in threading.enumerate() if t.name.startswith("bnstats")] == []
        assert_untouched(model, before)
    assert 10 <= handler.count <= 10 * presses  # two that come too close are one


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_ctrl_c_while_threads_end_after_another_failure_comes_when_all_have_ended(presses, handler):
    # The first batch fails while the others are in a long computation.
    class FirstFails(nn.Module):
        def forward(self, x):
            if len(x) == 8:
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)  # two that come too close are one
                raise ValueError("bad")
            time.sleep(0.05)
            return x

    model = nn.Sequential(nn.BatchNorm2d(2), FirstFails(), nn.BatchNorm2d(2))
    before = snapshot(model)
    with pytest.raises(Pressed) as caught:
        bnstats.recompute_population_stats(model, uneven() * 2, method="layerwise")
    errors = []
    error = caught.value
    while error is not None:
        errors.append(type(error))
        error = error.__context__
    assert ValueError in errors  # nothing swallowed
    assert 1 <= handler.count <= presses
    assert [t for t in threading.enumerate() if t.name.startswith("bnstats")] == []
    assert_untouched(model, before)


class Locked(nn.Module):
    """Takes a lock around its layer: the forwards of other batches wait for it."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        with self.lock:
            return self.bn(x)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_ends_forwards_that_wait_for_a_lock_that_a_held_one_has(presses, threads, handler):
    model, before_threads = nn.Sequential(nn.BatchNorm1d(3), Locked()), torch.get_num_threads()
    before = snapshot(model)
    torch.set_num_threads(threads)
    pressing = Presser(presses, after=0.3)
    pressing.ready.set()
    try:
        with pytest.raises(Pressed):
            bnstats.measure_population_stats(model, [torch.randn(5, 3)] * 6, method="layerwise")
    finally:
        handler.raising = False
        pressing.join()
        torch.set_num_threads(before_threads)
    assert [t for t in threading.enumerate() if t.name.startswith("bnstats")] == []
    assert not model[1].lock.locked()
    assert_untouched(model, before)


def test_an_error_ends_forwards_that_wait_for_a_lock_that_a_held_one_has():
    class Failing(Locked):
        def forward(self, x):
            if len(x) == 2:
                time.sleep(0.1)  # until the others hold the lock, or wait for it
                raise ValueError("bad")
            return super().forward(x)

    model, before_threads = Failing(), torch.get_num_threads()
    torch.set_num_threads(2)
    data = [torch.randn(n, 3) for n in (5, 5, 2)]
    try:
        with pytest.raises(ValueError, match="bad"):
            bnstats.measure_population_stats(model, data, method="layerwise")
    finally:
        torch.set_num_threads(before_threads)
    assert [t for t in threading.enumerate() if t.name.startswith("bnstats")] == []


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_while_statistics_are_written_puts_all_of_them_back(method, handler):
    class Interrupting(torch.Tensor):
        """A running variance that is written to in the middle of a Ctrl-C."""

        def copy_(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            return super().copy_(*args)

    model, data = trained(), uneven()
    model[5].running_var = model[5].running_var.as_subclass(Interrupting)
    before = snapshot(model)
    with pytest.raises(Pressed):
        bnstats.recompute_population_stats(model, data, method=method)
    handler.raising = False
    assert_untouched(model, before)


def test_a_signal_ends_the_callers_code_at_once(handler):
    def loader():
        yield torch.randn(4, 3)
        pressing.ready.set()
        time.sleep(20)

    pressing = Presser(1, after=0.05)
    start = time.perf_counter()
    with pytest.raises(Pressed):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), loader())
    pressing.join()
    assert time.perf_counter() - start < 10


def test_every_signal_is_handed_on_when_the_context_ends(handler):
    handler.raising = False
    with Interrupts() as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)
        assert handler.count == 0
        interrupts.check()
        assert handler.count == 3
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.count == 3
    assert handler.count == 4


@pytest.mark.parametrize("put_back_before", [False, True])
@pytest.mark.parametrize("position", [0, 1])
def test_ctrl_c_while_handlers_are_put_back_puts_all_of_them_back(
    position, put_back_before, handler, monkeypatch
):
    def other(*_): ...

    before, put_back = signal.signal(signal.SIGUSR1, other), signal.signal
    calls = iter(range(100))

    def pressed(*args):
        if next(calls) == position:
            if put_back_before:
                put_back(*args)
            signal.raise_signal(signal.SIGINT)
        return put_back(*args)

    try:
        with pytest.raises(Pressed), Interrupts():
            monkeypatch.setattr(signal, "signal", pressed)
        monkeypatch.undo()
        handler.raising = False
        assert handler.count == 1
        assert signal.getsignal(signal.SIGUSR1) is other
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        put_back(signal.SIGUSR1, before)


def test_a_handler_set_meanwhile_stays():
    before = signal.getsignal(signal.SIGINT)
    try:
        with Interrupts():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_than_the_main_one_measure_too():
    counts = []

    def run():
        stats = bnstats.measure_population_stats(
            nn.BatchNorm1d(3), [torch.randn(4, 3)] * 2, method="layerwise"
        )
        counts.append(stats[""].count)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counts == [8]
