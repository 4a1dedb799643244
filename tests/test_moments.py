"""The core's laws, and its exactness where the textbook formula fails."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracles
from bnstats import Moments
from bnstats.accumulators import cumulative, exponential, per_batch
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.moments import fold

# Sums of n values round to n ulp at worst, and a few hundred values are all that is drawn here.
RTOL = 1e-11

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
matrices = hnp.arrays(np.float64, st.tuples(st.integers(0, 8), st.just(3)), elements=finite)


def moments(array):
    return Moments.from_batch(torch.from_numpy(array))


def assert_same(a, b):
    assert torch.equal(a.count, b.count)
    scale = max(float(a.mean.abs().max()), 1.0)
    torch.testing.assert_close(a.mean, b.mean, rtol=RTOL, atol=RTOL * scale)
    torch.testing.assert_close(a.m2, b.m2, rtol=RTOL, atol=RTOL * scale**2 * int(a.count + 1))


@given(matrices)
def test_the_empty_state_is_the_identity_of_merge_to_the_last_bit(x):
    empty = Moments.empty(3)
    for merged in (moments(x) + empty, empty + moments(x)):
        assert torch.equal(merged.count, moments(x).count)
        assert torch.equal(merged.mean, moments(x).mean)
        assert torch.equal(merged.m2, moments(x).m2)


@given(matrices, matrices)
def test_merge_commutes(x, y):
    assert_same(moments(x) + moments(y), moments(y) + moments(x))


@given(matrices, matrices, matrices)
def test_merge_associates(x, y, z):
    a, b, c = moments(x), moments(y), moments(z)
    assert_same((a + b) + c, a + (b + c))


@given(st.lists(matrices, min_size=1, max_size=5))
def test_any_split_equals_the_whole(parts):
    together = Moments.empty(3)
    for part in parts:
        together = together + moments(part)
    assert_same(together, moments(np.concatenate(parts)))


@given(hnp.arrays(np.float64, (4, 3, 5), elements=finite), hnp.arrays(np.bool_, (4, 5)))
def test_masked_positions_do_not_count(x, mask):
    masked = Moments.from_batch(torch.from_numpy(x), mask=torch.from_numpy(mask))
    assert_same(masked, moments(np.moveaxis(x, 1, -1)[mask]))


def test_a_mask_broadcasts_over_positions():
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([1, 0, 1, 1]).bool()
    assert_same(Moments.from_batch(x, mask=mask[:, None]), Moments.from_batch(x[mask]))


@pytest.mark.parametrize("shape", [(16, 4), (4, 4, 50), (2, 4, 9, 11), (2, 4, 3, 5, 7)])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_digits_of_the_variance(shape, mean, dtype):
    # A variance from E[x^2] - E[x]^2 comes out negative for such data:
    # https://github.com/timgaripov/swa/issues/8, https://github.com/tensorflow/tensorflow/issues/3290
    spacing = 16.0 if mean == 1e8 and dtype == torch.float32 else 1.0
    x = (torch.randn(shape, dtype=torch.float64) * spacing + mean).to(dtype)
    expected_mean, expected_var = oracles.mean_var([x.double().numpy()])
    got = Moments.from_batch(x)
    # float32 sums round their rows to some 3e-7, magnified at most ninefold: see reduction.py.
    rtol = 1e-10 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(got.var(), expected_var, rtol=rtol)
    np.testing.assert_allclose(
        got.mean, expected_mean, rtol=1e-14, atol=rtol * expected_var.max() ** 0.5
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "long prime row"])
def test_the_memory_layout_does_not_matter(layout):
    x = torch.randn(4, 5, 12, 14) + torch.arange(5.0)[:, None, None]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x[:, :, ::2, 1::3]
    elif layout == "long prime row":
        x = torch.randn(2, 3, 10007)
    mean, var = oracles.mean_var([x.numpy()])
    got = Moments.from_batch(x)
    np.testing.assert_allclose(got.mean, mean, atol=1e-6)
    np.testing.assert_allclose(got.var(), var, rtol=2e-6)


def test_long_rows_keep_float32_accuracy():
    # One float32 accumulator over 50,176 squares loses 1.5e-6: rows are cut shorter than that.
    x = torch.randn(2, 8, 224, 224)
    _, var = oracles.mean_var([x.numpy()])
    np.testing.assert_allclose(Moments.from_batch(x).var(), var, rtol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 4), (8, 4, 6, 6)])
def test_half_inputs_are_accumulated_wide(dtype, shape):
    x = (torch.randn(shape) + 10).to(dtype)
    mean, var = oracles.mean_var([x.double().numpy()])
    got = Moments.from_batch(x)
    assert got.mean.dtype == got.m2.dtype == torch.float64
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.var(), var, rtol=2e-6)


def test_fp16_squares_do_not_overflow():
    got = Moments.from_batch(torch.full((4, 2, 8), 60000.0, dtype=torch.float16))
    torch.testing.assert_close(got.mean, torch.full((2,), 60000.0).half().double())
    assert (got.m2 == 0).all()


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -3])
def test_any_axis_may_hold_the_channels(channel_dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    moved = x.movedim(channel_dim, 0).flatten(1)
    got = Moments.from_batch(x, channel_dim=channel_dim)
    assert int(got.count) == moved.shape[1]
    torch.testing.assert_close(got.mean, moved.mean(1))
    torch.testing.assert_close(got.var(), moved.var(1))


def test_too_few_values_have_no_variance():
    none, one = Moments.empty(2), Moments.from_batch(torch.randn(1, 2))
    assert none.var(0).isnan().all()
    assert none.var(1).isnan().all()
    assert (one.var(0) == 0).all()
    assert one.var(1).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
def test_a_batch_of_no_values_is_the_empty_state(shape):
    got = Moments.from_batch(torch.empty(shape))
    assert int(got.count) == 0
    assert (got.mean == 0).all()
    assert (got.m2 == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3, 3)])
def test_what_is_not_finite_shows_in_its_channel_alone(value, shape):
    x = torch.randn(shape)
    x[0, 1] = value
    got = Moments.from_batch(x)
    assert not (got.mean + got.m2)[1].isfinite()
    assert (got.mean + got.m2)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 2), (3, 2, 5, 5), (16, 64, 32, 32)])  # the last by rows
def test_values_that_are_all_equal_have_no_spread(dtype, shape):
    x = torch.full(shape, 0.1, dtype=dtype)
    got = Moments.from_batch(x)
    assert (got.mean == x.flatten()[0]).all()
    assert (got.m2 == 0).all()


@pytest.mark.parametrize("length", [1369, 2809, 4099])  # 37^2, 53^2, and a prime
def test_rows_of_any_length_keep_their_digits(length):
    x = torch.randn(12, 16, length)
    side = math.isqrt(length)
    if side**2 == length:
        x = x.view(12, 16, side, side)
    got = Moments.from_batch(x)
    mean, var = oracles.mean_var([x.double().numpy()])
    np.testing.assert_allclose(got.mean, mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(got.var(), var, rtol=4e-7)  # float32 adds up a row's squares


def test_squares_beyond_float32_are_added_up_in_float64():
    x = torch.randn(8, 64, 32, 32) * 1e25
    got = Moments.from_batch(x)
    _, var = oracles.mean_var([x.double().numpy()])
    np.testing.assert_allclose(got.var(), var, rtol=1e-12)


def test_ten_thousand_merges_keep_twelve_digits():
    x = torch.randn(10_000, 2, 3, dtype=torch.float64) + 1e3
    total = Moments.empty(3)
    for batch in x:
        total = total + Moments.from_batch(batch)
    mean, var = oracles.mean_var(x.numpy())
    np.testing.assert_allclose(total.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(total.var(), var, rtol=1e-12)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_cumulative_weights_give_the_unbiased_variance_of_all_values(sizes):
    parts = [torch.randn(n, 1, dtype=torch.float64).numpy() + i for i, n in enumerate(sizes)]
    mean, var, seen = torch.zeros(1).double(), torch.ones(1).double(), 0
    for part in parts:
        m, s = map(torch.from_numpy, oracles.mean_var([part]))
        mean, var = fold(mean, var, m, s, cumulative(seen, len(part)))
        seen += len(part)
    expected = oracles.mean_var(parts)
    np.testing.assert_allclose((mean, var), expected, rtol=1e-10)


def test_weights_are_the_same_for_numbers_and_tensors():
    t = torch.tensor(7.0, dtype=torch.float64)
    for pair in [
        (exponential(7, 0.1, 5), exponential(t, 0.1, 5)),
        (exponential(7, 0.1, 5, debias=False), exponential(t, 0.1, 5, debias=False)),
        (per_batch(7), per_batch(t)),
        (per_batch(7, 5, pooled=True), per_batch(t, 5, pooled=True)),
        (cumulative(7, 5), cumulative(t, 5)),
        (cumulative(0, 5), cumulative(t * 0, 5)),
    ]:
        np.testing.assert_allclose(*pair, rtol=1e-15)


def test_a_momentum_of_zero_never_moves_and_of_one_forgets_all():
    state, batch = (torch.tensor([math.nan]), torch.tensor([2.0])), torch.tensor([3.0])
    assert fold(*state, batch, batch, exponential(5, 1.0, 4)) == (3.0, 3.0)
    state = (torch.tensor([5.0]), torch.tensor([2.0]))
    assert fold(*state, batch, batch, exponential(1, 0.0, 4)) == state


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Moments.from_batch([1.0]), InvalidTypeError, "expected a tensor, got list"),
        (lambda: Moments.from_batch(torch.zeros(3)), InvalidValueError, "has no axis 1"),
        (
            lambda: Moments.from_batch(torch.zeros(4, 3), mask=torch.ones(4)),
            InvalidTypeError,
            "expected torch.bool, got torch.float32",
        ),
        (
            lambda: Moments.from_batch(torch.zeros(4, 3, 5), mask=torch.ones(3).bool()),
            InvalidValueError,
            r"broadcasts to \(4, 5\).*got \(3,\)",
        ),
        (lambda: Moments.empty(3) + Moments.empty(2), InvalidValueError, "expected 3 channels"),
        (lambda: Moments.empty(-1), InvalidValueError, "got -1"),
        (
            lambda: Moments(1, torch.zeros(3), torch.zeros(2)),
            InvalidValueError,
            r"one shape \(C,\)",
        ),
    ],
)
def test_misuse_says_what_was_expected_and_what_came(call, error, says):
    with pytest.raises(error, match=says):
        call()
