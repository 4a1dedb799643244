"""The mean of the last m values, in ring buffers: step t has slot ``t mod m``.

Steps count from 1. A step of 0 is one that does not count: it has no slot. A step is a number
where the host knows it; rings and values may be numpy's arrays then, whose small operations cost
a third of torch's. Else it is a tensor of shape () that the host does not wait for.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

Step: TypeAlias = int | Tensor
Values: TypeAlias = Any
"""A Tensor, or an NDArray beside steps that are numbers."""


def write(ring: Values, step: Step, value: Values) -> None:
    """Write a step's value, of shape (..., C), into its slot of a ring, of shape (m, ..., C)."""
    if isinstance(step, Tensor):
        torch.where(_rows_of(step, ring), value, ring, out=ring)
    elif step:
        ring[step % len(ring)] = value


def written(ring: Tensor, step: Tensor, value: Tensor) -> Tensor:
    """Return what :func:`write` makes of a ring, and leave the ring alone."""
    return torch.where(_rows_of(step, ring), value, ring)


def windowed(ring: Values, step: Step, value: Values, warmup: int) -> Values:
    """Return the mean of the ring once the step is warm, until then the step's own value.

    Warm is a step after more than m and at least ``warmup`` steps.
    """
    if isinstance(step, Tensor):
        return torch.where(step >= _warm_from(ring, warmup), ring.mean(0), value)
    # A mean takes twice as long as a sum.
    return ring.sum(0) / len(ring) if step >= _warm_from(ring, warmup) else value


def add(ring: Values, owners: Values, step: Step, value: Values, warmup: int) -> Values:
    """Add a value of a step to its slot; return its part in the window's mean.

    Values of one step may come in several parts, in any order of steps. ``owners``, of shape
    (m,), holds the step that each slot belongs to, 0 where there is none yet. The first part of
    a step takes its slot over, the others add to it; one that comes later than a whole turn of
    the ring finds its slot taken, and changes nothing. The mean is over the slots taken within
    the last two turns: one that waits for its next value still has its last.

    The results for all parts of one step add up to the mean with all of them in it: the first
    part's is the mean of the ring, the others' their own share in it. Before the step is warm,
    and for a value that is not finite, which is not written, the result is the value itself.
    """
    if isinstance(step, Tensor):
        return _add_on_device(ring, owners, step, value, warmup)
    if not step or not is_finite(value):
        return value
    slot, taken = step % len(ring), owners.tolist()
    owner = taken[slot]
    if owner == step:
        ring[slot] += value
    elif owner < step:
        ring[slot] = value
        owners[slot] = taken[slot] = step
    if step < _warm_from(ring, warmup):
        return value
    oldest = max(step - 2 * len(ring), 0)
    recent = ring if min(taken) > oldest else ring[owners > oldest]
    return (value if owner == step else recent.sum(0)) / len(recent)


def _add_on_device(
    ring: Tensor, owners: Tensor, step: Tensor, value: Tensor, warmup: int
) -> Tensor:
    finite = value.sum().isfinite()
    slot = _slot_of(step, ring) & (owners <= step) & finite
    again = slot & (owners == step)
    before = torch.where(again.unsqueeze(1), ring, 0)
    torch.where(slot.unsqueeze(1), value + before, ring, out=ring)
    torch.where(slot, step, owners, out=owners)
    recent = owners > (step - 2 * len(ring)).clamp_(min=0)
    total = torch.where(again.any(), value, torch.where(recent.unsqueeze(1), ring, 0).sum(0))
    warm = (step >= _warm_from(ring, warmup)) & finite
    return torch.where(warm, total / recent.sum(), value)


def latest_steps(num_steps: Tensor, ring: Tensor) -> Tensor:
    """Return the latest step of each slot, of shape (m,); below 1 for a slot without one."""
    slots = torch.arange(len(ring), device=ring.device)
    return num_steps - (num_steps - slots) % len(ring)


def is_finite(value: Values) -> bool:
    """Ask on the host whether all of a value is finite."""
    # A sum is finite if all of it is, but for sums at the edge of what the dtype holds.
    return math.isfinite(value.sum())


def _slot_of(step: Tensor, ring: Values) -> Tensor:
    slots = torch.arange(len(ring), device=step.device)
    return (slots == step % len(ring)) & (step > 0)


def _rows_of(step: Tensor, ring: Tensor) -> Tensor:
    return _slot_of(step, ring).view(-1, *[1] * (ring.dim() - 1))


def _warm_from(ring: Values, warmup: int) -> int:
    return max(len(ring) + 1, warmup)
