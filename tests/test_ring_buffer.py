"""Ring buffers: their mean is that of the last values, by numbers and by tensors alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnstats.accumulators import ring_buffer

CHANNELS = 3

# Rounding of a mean of a few float64 numbers.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def step_as(kind, step):
    return torch.tensor(step) if kind == "tensor" else step


def values(count):
    return torch.randn(count, CHANNELS, dtype=torch.float64)


def rings(length):
    ring = torch.zeros(length, CHANNELS, dtype=torch.float64)
    return ring, torch.zeros(length, dtype=torch.int64)


kinds = pytest.mark.parametrize("kind", ["number", "tensor"])
sizes = given(length=st.integers(1, 6), count=st.integers(1, 20), warmup=st.integers(0, 12))


@kinds
@sizes
@settings(max_examples=40, deadline=None)
def test_windowed_is_the_mean_of_the_last_values_once_warm(kind, length, count, warmup):
    ring, _ = rings(length)
    series = values(count)
    for t, value in enumerate(series, start=1):
        step = step_as(kind, t)
        window.write(ring, step, value)
        warm = t > length and t >= warmup
        expected = series[t - length : t].mean(0) if warm else value
        torch.testing.assert_close(window.windowed(ring, step, value, warmup), expected, **CLOSE)


@kinds
@sizes
@settings(max_examples=40, deadline=None)
def test_add_is_the_mean_of_the_last_values_once_warm(kind, length, count, warmup):
    ring, owners = rings(length)
    series = values(count)
    for t, value in enumerate(series, start=1):
        result = window.add(ring, owners, step_as(kind, t), value, warmup)
        warm = t > length and t >= warmup
        expected = series[t - length : t].mean(0) if warm else value
        torch.testing.assert_close(result, expected, **CLOSE)


@kinds
@given(
    length=st.integers(1, 6),
    gaps=st.lists(st.integers(1, 8), min_size=1, max_size=20),
    warmup=st.integers(0, 12),
)
@settings(max_examples=40, deadline=None)
def test_add_forgets_a_value_after_two_turns(kind, length, gaps, warmup):
    ring, owners = rings(length)
    added = {}
    for t, value in zip(np.cumsum(gaps).tolist(), values(len(gaps)), strict=True):
        result = window.add(ring, owners, step_as(kind, t), value, warmup)
        added[t % length] = t, value
        recent = torch.stack([v for step, v in added.values() if step > t - 2 * length])
        warm = t > length and t >= warmup
        torch.testing.assert_close(result, recent.mean(0) if warm else value, **CLOSE)


@kinds
@given(parts=st.lists(st.floats(-10, 10), min_size=1, max_size=4), warm=st.booleans())
@settings(max_examples=40, deadline=None)
def test_parts_of_a_step_give_the_whole_however_it_is_split(kind, parts, warm):
    steps = 9 if warm else 3
    series = values(steps)
    whole, owners = rings(4)
    split, split_owners = rings(4)
    for t, value in enumerate(series[:-1], start=1):
        window.add(whole, owners, t, value, 0)
        window.add(split, split_owners, t, value, 0)
    total = torch.full((CHANNELS,), float(np.sum(parts)), dtype=torch.float64)
    expected = window.add(whole, owners, steps, total, 0)
    result = sum(
        window.add(split, split_owners, step_as(kind, steps), torch.full_like(total, part), 0)
        for part in parts
    )
    torch.testing.assert_close(result, expected, **CLOSE)
    torch.testing.assert_close(split, whole, **CLOSE)


@kinds
def test_a_step_that_does_not_count_writes_nothing(kind):
    ring, owners = rings(4)
    window.write(ring, step_as(kind, 0), values(1)[0])
    window.add(ring, owners, step_as(kind, 0), values(1)[0], 0)
    assert not ring.any()
    assert not owners.any()


@kinds
def test_latest_steps_are_those_that_were_written(kind):
    ring, owners = rings(4)
    for t in range(1, 11):
        window.add(ring, owners, step_as(kind, t), values(1)[0], 0)
        latest = window.latest_steps(torch.tensor(t), ring)
        assert torch.equal(latest.clamp(min=0), owners)
