"""The mean of the last m values, in a ring buffer: step t, counted from 1, has slot ``t mod m``.

Each operation stands here twice: for the host, with numbers and numpy's arrays, whose small
operations cost a third of torch's, and for a device, with tensors that the host does not wait for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def is_warm(step: Any, length: int, warmup: int) -> Any:
    """Whether a step, counted from 1, comes after step ``length`` and not before ``warmup``."""
    return step >= max(length + 1, warmup)


def slots(owners: Tensor) -> Tensor:
    """Return 0 to m - 1, for a tensor of shape (m,)."""
    if type(owners) is not Tensor:  # a DTensor does not mix with plain tensors
        return torch.ones_like(owners).cumsum(0) - 1
    return torch.arange(len(owners), device=owners.device)


def latest_steps(num_steps: Tensor, owners: Tensor) -> Tensor:
    """Return the latest step of each slot, of shape (m,); below 1 for a slot without one."""
    return num_steps - (num_steps - slots(owners)) % len(owners)


def add_on_host(ring: Array, owners: Array, step: int, value: Array, warmup: int) -> Array:
    """Add a value of a step to its slot; return its part in the window's mean.

    Values of one step may come in several parts, in any order of steps. ``owners``, of shape
    (m,), holds the step that each slot belongs to, 0 where there is none yet. The first part of
    a step takes its slot over, the others add to it; one that comes later than a whole turn of
    the ring finds its slot taken, and changes nothing. The mean is over the slots taken within
    the last two turns: one that waits for its next value still has its last.

    The results for all parts of one step add up to the mean with all of them in it: the first
    part's is the mean of the ring, the others' their own share in it. Before the step is warm,
    and for a value that is not finite, which is not written, the result is the value itself.

    Args:
        ring: of shape (m, C); written to.
        owners: of shape (m,); written to.
        step: 0 for a value that belongs to no step; negative for one of the step's size that
            writes nothing.
        value: of shape (C,).
        warmup: see :func:`is_warm`.
    """
    if not step or not math.isfinite(value.sum()):
        return value
    if step < 0:
        ring, owners, step = ring.copy(), owners.copy(), -step
    slot, taken = step % len(ring), owners.tolist()
    owner = taken[slot]
    if owner == step:
        ring[slot] += value
    elif owner < step:
        ring[slot] = value
        owners[slot] = taken[slot] = step
    if not is_warm(step, len(ring), warmup):
        return value
    oldest = max(step - 2 * len(ring), 0)
    recent = ring if min(taken) > oldest else ring[owners > oldest]
    # A mean takes twice as long as a sum.
    part: Array = (value if owner == step else recent.sum(0)) / len(recent)
    return part


def add_on_device(
    ring: Tensor, owners: Tensor, step: Tensor, value: Tensor, warmup: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ring, its owners, and what :func:`add_on_host` returns; write to nothing."""
    number = step.abs()
    # (isfinite is four operators.)
    counts = torch.logical_and(torch.linalg.vector_norm(value, torch.inf) < torch.inf, step)
    slot = (slots(owners) == number % len(ring)) & (owners <= number) & counts
    again = slot & (owners == number)
    before = torch.where(again.unsqueeze(1), ring, 0)
    ring = torch.where(slot.unsqueeze(1), value + before, ring)
    owners = torch.where(slot, number, owners)
    recent = owners > (number - 2 * len(ring)).clamp(min=0)
    total = torch.where(again.any(), value, torch.where(recent.unsqueeze(1), ring, 0).sum(0))
    warm = is_warm(number, len(ring), warmup) & counts
    return ring, owners, torch.where(warm, total / recent.sum(), value)
