"""Ring buffers: their mean is that of the last values, on the host and on a device alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnstats.accumulators import ring_buffer

CHANNELS = 3

# Rounding of a mean of a few float64 numbers.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class OnHost:
    """A ring in numpy's arrays, which are written to."""

    def __init__(self, length):
        self.ring, self.owners = np.zeros((length, CHANNELS)), np.zeros(length, dtype=np.int64)

    def add(self, step, value, warmup):
        return ring_buffer.add_on_host(self.ring, self.owners, step, value, warmup)


class OnDevice:
    """A ring in tensors; each step makes new ones."""

    def __init__(self, length):
        self._ring = torch.zeros(length, CHANNELS, dtype=torch.float64)
        self._owners = torch.zeros(length, dtype=torch.int64)

    @property
    def ring(self):
        return self._ring.numpy()

    @property
    def owners(self):
        return self._owners.numpy()

    def add(self, step, value, warmup):
        value = torch.from_numpy(value)
        ring, owners = self._ring.clone(), self._owners.clone()
        *new, result = ring_buffer.add_on_device(
            self._ring, self._owners, torch.tensor(step), value, warmup
        )
        assert torch.equal(self._ring, ring)
        assert torch.equal(self._owners, owners)
        if step > 0:  # what the layer does, for which a negative step writes nothing
            self._ring, self._owners = new
        return result.numpy()


def values(count):
    return np.random.default_rng(0).normal(size=(count, CHANNELS))


places = pytest.mark.parametrize("place", [OnHost, OnDevice])


@places
@given(length=st.integers(1, 6), count=st.integers(1, 20), warmup=st.integers(0, 12))
@settings(max_examples=40)
def test_add_is_the_mean_of_the_last_values_once_warm(place, length, count, warmup):
    ring, series = place(length), values(count)
    for t, value in enumerate(series, start=1):
        result = ring.add(t, value, warmup)
        warm = t > length and t >= warmup
        assert ring_buffer.is_warm(t, length, warmup) == warm
        expected = series[t - length : t].mean(0) if warm else value
        np.testing.assert_allclose(result, expected, **CLOSE)


@places
@given(
    length=st.integers(1, 6),
    gaps=st.lists(st.integers(1, 8), min_size=1, max_size=20),
    warmup=st.integers(0, 12),
)
@settings(max_examples=40)
def test_add_forgets_a_value_after_two_turns(place, length, gaps, warmup):
    ring, added = place(length), {}
    for t, value in zip(np.cumsum(gaps).tolist(), values(len(gaps)), strict=True):
        result = ring.add(t, value, warmup)
        added[t % length] = t, value
        recent = np.stack([v for step, v in added.values() if step > t - 2 * length])
        warm = t > length and t >= warmup
        np.testing.assert_allclose(result, recent.mean(0) if warm else value, **CLOSE)


@places
@given(parts=st.lists(st.floats(-10, 10), min_size=1, max_size=4), warm=st.booleans())
@settings(max_examples=40)
def test_parts_of_a_step_give_the_whole_however_it_is_split(place, parts, warm):
    steps = 9 if warm else 3
    whole, split = place(4), place(4)
    for t, value in enumerate(values(steps)[:-1], start=1):
        whole.add(t, value, 0)
        split.add(t, value, 0)
    expected = whole.add(steps, np.full(CHANNELS, np.sum(parts)), 0)
    result = sum(split.add(steps, np.full(CHANNELS, part), 0) for part in parts)
    np.testing.assert_allclose(result, expected, **CLOSE)
    np.testing.assert_allclose(split.ring, whole.ring, **CLOSE)


@places
def test_a_part_that_comes_after_a_turn_changes_nothing(place):
    ring = place(4)
    for t, value in enumerate(values(9), start=1):
        ring.add(t, value, 0)
    before, owners = ring.ring.copy(), ring.owners.copy()
    late = ring.add(5, values(1)[0], 0)  # 9 has its slot
    np.testing.assert_array_equal(ring.ring, before)
    np.testing.assert_array_equal(ring.owners, owners)
    np.testing.assert_allclose(late, before.mean(0), **CLOSE)


@places
@pytest.mark.parametrize("step", [0, 9])
def test_a_step_that_does_not_count_writes_nothing_and_stays_itself(place, step):
    ring = place(4)
    for t, value in enumerate(values(8), start=1):
        ring.add(t, value, 0)
    before, owners = ring.ring.copy(), ring.owners.copy()
    value = np.ones(CHANNELS)
    if step:
        value[1] = np.inf
    np.testing.assert_array_equal(ring.add(step, value, 0), value)
    np.testing.assert_array_equal(ring.ring, before)
    np.testing.assert_array_equal(ring.owners, owners)


@places
@pytest.mark.parametrize("step", [3, 9, 10])
def test_a_negative_step_gives_the_mean_of_its_size_and_writes_nothing(place, step):
    ring, other = place(4), place(4)
    for t, value in enumerate(values(9 if step == 9 else step - 1), start=1):
        ring.add(t, value, 0)
        other.add(t, value, 0)
    before, owners = ring.ring.copy(), ring.owners.copy()
    value = np.ones(CHANNELS)
    np.testing.assert_array_equal(ring.add(-step, value, 0), other.add(step, value, 0))
    np.testing.assert_array_equal(ring.ring, before)
    np.testing.assert_array_equal(ring.owners, owners)


@given(
    length=st.integers(1, 4),
    steps=st.lists(st.integers(-12, 12), min_size=1, max_size=30),
    warmup=st.integers(0, 8),
    seed=st.integers(0, 100),
)
@settings(max_examples=100)
def test_host_and_device_agree_on_steps_in_any_order(length, steps, warmup, seed):
    rng = np.random.default_rng(seed)
    host, device = OnHost(length), OnDevice(length)
    for step in steps:
        value = rng.normal(size=CHANNELS)
        value[0] = rng.choice([value[0], np.nan, np.inf], p=[0.8, 0.1, 0.1])
        ours, theirs = (ring.add(step, value, warmup) for ring in (host, device))
        np.testing.assert_allclose(ours, theirs, **CLOSE)
        np.testing.assert_allclose(host.ring, device.ring, **CLOSE)
        np.testing.assert_array_equal(host.owners, device.owners)


@places
def test_latest_steps_are_those_that_were_written(place):
    ring = place(4)
    for t in range(1, 11):
        ring.add(t, values(1)[0], 0)
        latest = ring_buffer.latest_steps(torch.tensor(t), torch.zeros(4, dtype=torch.int64))
        np.testing.assert_array_equal(latest.clamp(min=0), ring.owners)
