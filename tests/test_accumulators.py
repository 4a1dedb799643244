"""The weights of every policy against the recursion, and the recursion taken in every way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from bnstats import CumulativeBatchNorm1d, EMABatchNorm1d
from bnstats.accumulators import cumulative, exponential, per_batch, separate
from bnstats.moments import Weights, fold, fold_

momenta = st.one_of(st.just(1.0), st.floats(1e-6, 1.0))
counts = st.integers(0, 300)
sizes = st.integers(2, 40)


def general(weight, q, n):
    """The weights of a batch of n values by the docstring of accumulators.averaging, and Q'."""
    after = (1 - weight) ** 2 * q + weight**2 / n
    u = (n - 1) / n
    fade = (1 + (1 - weight) * q - weight / n) / u
    return Weights(1 / weight, (1 - after) / (weight * u), fade, 1 / u), after


def same_weights(ours, expected, rtol):
    if expected.size == 1:  # it replaces the state, so that the rest is of no effect
        assert float(ours.size) == 1.0
        return
    for name, value in expected._asdict().items():
        assert float(getattr(ours, name)) == pytest.approx(value, rel=rtol), name


# Counters are numbers, or tensors whose weights are float32.
kinds = pytest.mark.parametrize(
    ("kind", "rtol"), [(int, 1e-9), (torch.tensor, 2e-6)], ids=["numbers", "tensors"]
)


@kinds
@pytest.mark.parametrize("debias", [True, False])
@given(momentum=momenta, batches=counts, n=sizes)
def test_exponential_weights_are_those_of_the_recursion(kind, rtol, debias, momentum, batches, n):
    q = 0.0
    for t in range(1, batches + 2):
        decay = -math.expm1(t * math.log1p(-momentum)) if momentum < 1 and t > 1 else momentum
        expected, q = general(momentum / decay if debias else momentum, q, n)
    same_weights(exponential(kind(batches), momentum, n, debias=debias), expected, rtol)


@kinds
@given(batches=counts, n=sizes)
def test_weights_per_batch_are_those_of_the_recursion(kind, rtol, batches, n):
    q = 0.0
    for t in range(1, batches + 2):
        expected, q = general(1 / t, q, n)
    same_weights(per_batch(kind(batches), n, pooled=True), expected, rtol)


@kinds
@given(before=st.lists(sizes, max_size=50), n=sizes)
def test_cumulative_weights_are_those_of_the_recursion_uneven_batches_included(
    kind, rtol, before, n
):
    q, total = 0.0, 0
    for size in [*before, n]:
        total += size
        expected, q = general(size / total, q, size)
    same_weights(cumulative(kind(sum(before)), n), expected, rtol)


@kinds
@given(momentum=momenta, batches=counts)
def test_without_pooling_means_and_variances_weigh_alike(kind, rtol, momentum, batches):
    decay = 1 - (1 - momentum) ** (batches + 1)
    for ours, size in (
        (exponential(kind(batches), momentum, debias=False, pooled=False), 1 / momentum),
        (exponential(kind(batches), momentum, pooled=False), decay / momentum),
        (per_batch(kind(batches)), batches + 1),
    ):
        # The definition cancels where momentum is small.
        assert float(ours.size) == pytest.approx(size, rel=max(rtol, 1e-15 / momentum))
        assert float(ours.divisor) == float(ours.size)
        assert (ours.fade, ours.between) == (1, 0)


policies = st.one_of(
    st.builds(separate, st.floats(1, 100)),
    st.builds(exponential, counts, momenta, sizes, debias=st.booleans(), pooled=st.booleans()),
    st.builds(per_batch, counts, sizes, pooled=st.booleans()),
    st.builds(cumulative, st.integers(0, 1000), sizes),
)


@given(weights=policies, seed=st.integers(0, 1000))
@settings(max_examples=300)
def test_a_step_is_the_same_in_place_by_numbers_and_by_tensors(weights, seed):
    rng = np.random.default_rng(seed)
    mean, batch_mean = (torch.from_numpy(rng.normal(0, 3, 5)) for _ in range(2))
    var, batch_var = (torch.from_numpy(rng.uniform(0, 4, 5)) for _ in range(2))
    wide = Weights(*(torch.tensor(float(x), dtype=torch.float64) for x in weights))
    size, divisor, fade, between = weights
    d = batch_mean - mean
    expected = (
        mean + d / size,
        # A size of 1 replaces the whole state, with any other weights.
        batch_var
        if size == 1
        else var + (batch_var - fade * var + between * (1 - 1 / size) * d**2) / divisor,
    )
    new = fold(mean, var, batch_mean, batch_var, weights)
    by_tensors = fold(mean, var, batch_mean, batch_var, wide)
    in_place = mean.clone(), var.clone()
    assert fold_(*in_place, batch_mean, batch_var, weights)
    for results in (new, by_tensors, in_place):
        torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


@given(weights=policies, seed=st.integers(0, 1000))
def test_a_step_leaves_what_it_is_given_alone(weights, seed):
    rng = np.random.default_rng(seed)
    given = [torch.from_numpy(rng.uniform(0, 4, 5)) for _ in range(4)]
    before = [x.clone() for x in given]
    new = fold(*given, weights)
    for x, y in zip(given, before, strict=True):
        assert torch.equal(x, y)
    new[0].add_(1)
    new[1].add_(1)
    for x, y in zip(given, before, strict=True):  # nor is what it returns a part of it
        assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@given(weights=policies)
@settings(max_examples=30)
def test_a_batch_that_is_not_finite_takes_no_step_in_place(bad, weights):
    mean, var = torch.ones(2), torch.ones(2)
    batch = torch.tensor([1.0, bad])
    assert not fold_(mean, var, batch, torch.tensor([1.0, math.nan]), weights)
    assert not fold_(mean, var, torch.ones(2), batch, weights)
    assert mean.tolist() == var.tolist() == [1, 1]


LAYERS = {
    "ema": EMABatchNorm1d,
    "neither debiased nor pooled": lambda *a, **k: EMABatchNorm1d(
        *a, **k, debias=False, pooled=False
    ),
    "cumulative": CumulativeBatchNorm1d,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("momentum", [0, 0.1, 1.0, None])
def test_the_weights_are_a_pure_function_of_the_counters(make, momentum):
    layer = cases.built(make, 3, momentum=momentum)
    nowhere = cases.built(make, 3, momentum=momentum, device="meta")  # which has no values to read
    before = cases.state(layer)
    for count in (0, 7):
        numbers = [count * (1 + index) for index in range(len(layer._counters))]
        first = layer._weigh(numbers, 8)
        tensors = [torch.tensor(number) for number in numbers]
        for _ in range(2):
            assert layer._weigh(numbers, 8) == nowhere._weigh(numbers, 8) == first
            same_weights(layer._weigh(tensors, 8), first, 2e-6)
        assert [int(x) for x in tensors] == numbers
    cases.assert_state(layer, before)
