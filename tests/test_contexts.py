"""Contexts may be entered again, and decorate functions that run when they are called."""

import contextlib
import functools
import threading

import pytest
import torch
from torch import nn

import bnstats
from bnstats.contexts import Context
from bnstats.errors import InvalidTypeError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), bnstats.EMABatchNorm1d(3))


def updates(model):
    return int(model[1].num_batches_tracked)


X = torch.randn(8, 4)
CONTEXTS = {
    "hold_statistics": bnstats.hold_statistics,
    "observe": bnstats.observe,
    "masked": lambda model: bnstats.masked(model, torch.ones(8, dtype=torch.bool)),
    "record_batch_stats": bnstats.record_batch_stats,
}
each_context = pytest.mark.parametrize("make", CONTEXTS.values(), ids=CONTEXTS)


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@each_context
def test_a_context_is_entered_again_and_leaves_nothing_behind(make):
    model = network()
    context = make(model)
    for _ in range(2):
        with context:
            model(X)
    with context, context:
        model(X)
    with pytest.raises(ZeroDivisionError), context:
        _ = 1 / 0
    assert hooks(model) == [0, 0, 0]
    before = updates(model)
    model(X)
    assert updates(model) == before + 1


def test_a_held_step_is_held_each_time_that_it_is_entered():
    model, (first, second) = network(), torch.randn(2, 8, 4)
    held = bnstats.hold_statistics(model)
    for x in (first, second):  # sharpness-aware minimization: two forwards, one counts
        model(x)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with held:
            model(x + 1)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert updates(model) == 2


def test_each_time_an_observation_and_a_record_are_new():
    model = network()
    observing, recording = bnstats.observe(model), bnstats.record_batch_stats(model)
    for count in (1, 3):
        with observing as seen, recording as record:
            for _ in range(count):
                model(X)
        assert seen.num_batches == len(record["1"]) == count


def test_a_mask_that_is_entered_again_is_the_same():
    model, mask = network(), torch.arange(8) < 5
    masked = bnstats.masked(model, mask)
    for _ in range(2):
        with masked:
            output = model(X)
        assert output[mask].mean(0).abs().max() < 1e-6 < output.mean(0).abs().max()


def generator():
    yield


async def coroutine():
    pass


async def asynchronous_generator():
    yield


class Awaited:
    async def __call__(self):
        pass


@each_context
@pytest.mark.parametrize(
    "function",
    [generator, coroutine, asynchronous_generator, functools.partial(generator), Awaited()],
    ids=["generator", "coroutine", "async generator", "partial", "object"],
)
def test_what_runs_after_its_call_is_not_decorated(make, function):
    decorate = make(network())
    with pytest.raises(InvalidTypeError, match=r"runs after the call.*use `with .*` inside of it"):
        decorate(function)


@each_context
def test_what_is_no_function_is_not_decorated(make):
    with pytest.raises(InvalidTypeError, match=r"expected a function to decorate, got int"):
        make(network())(3)


@each_context
def test_a_decorated_function_keeps_its_name_and_its_result(make):
    model = network()

    @make(model)
    def step(x, *, scale):
        """Run the model."""
        return model(x) * scale

    assert (step.__name__, step.__doc__) == ("step", "Run the model.")
    for _ in range(2):
        assert step(X, scale=0).abs().max() == 0
    assert hooks(model) == [0, 0, 0]


def test_a_function_that_threads_run_at_once_leaves_the_context_that_it_entered():
    # The first to enter leaves first, as no stack does.
    left = []
    first_entered, entered, first_left = (threading.Event() for _ in range(3))
    names = iter("ab")

    @contextlib.contextmanager
    def make():
        name = next(names)
        yield
        left.append(name)

    @Context("context", make)
    def run(is_first):
        if is_first:
            first_entered.set()
            assert entered.wait(10)
        else:
            entered.set()
            assert first_left.wait(10)

    first = threading.Thread(target=lambda: (run(True), first_left.set()))
    first.start()
    assert first_entered.wait(10)
    run(False)
    first.join()
    assert left == ["a", "b"]
