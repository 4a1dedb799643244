"""What the last training forwards had, for activation checkpointing, which runs them again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnstats.accumulators import ring_buffer
from bnstats.errors import InvalidValueError
from bnstats.layers.operators import Referable, opaque, referred, register
from bnstats.private import in_backward_pass, on_host

REMEMBERED = 16
"""Forwards that are remembered."""

SAME = 0.01
"""Relative distance up to which two keys can be one batch's, computed twice. On most devices they
are equal to the bit; some kernels add up in an order that varies."""

TIED = 1e-5
"""Difference of two forwards' distances, relative to the key, up to which both are as near: what
rounding makes of it depends on how the batch's mean was computed."""

REMEDY = f"run backward at most {REMEMBERED} forwards later"


@dataclass
class _Forward:
    key: Tensor
    value: Tensor
    plain: bool
    waits: Tensor | None = None
    """Whether it is yet to run again, of shape (); None until the first one ran again."""


class Recall(Referable):
    """A value for each of the last forwards, by a vector that identifies the forward's batch.

    A copy or an unpickled one is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forwards: deque[_Forward] = deque(maxlen=REMEMBERED)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recall:
        return Recall()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recall, ()

    @property
    def last(self) -> Tensor | None:
        """The value of the latest forward."""
        return self._forwards[-1].value if self._forwards else None

    def remember(self, key: Tensor, value: Tensor, *, plain: bool = False) -> None:
        """Keep the value of a forward; a plain one is recognized by :meth:`repeats_plain`."""
        self._forwards.append(_Forward(key, value, plain))

    def repeats_plain(self, key: Tensor) -> bool:
        """Ask, on the host, whether the forward with this key, which runs again, was plain.

        If it was, it has now run again.
        """
        known = self._known(key)
        if not known:
            return False
        index, found = self._nearest(known, key)
        plain = bool(found) and known[int(index)].plain
        if plain:
            self._have_run_again(known, index)
        return plain

    def find(self, key: Tensor) -> Tensor:
        """Return the value of the forward with this key; of one not finite NaN.

        Of several, it is the latest that is yet to run again: a backward takes the latest first.

        Raises:
            InvalidValueError: the forward is too long ago; where the host does not wait for the
                device, NaN comes of it.
        """
        known = self._known(key)
        if not known:
            raise too_long_ago(REMEMBERED, REMEDY)
        index, found = self._nearest(known, key)
        self._have_run_again(known, index)
        if on_host(key) and not found and key.isfinite().all():
            raise too_long_ago(REMEMBERED, REMEDY)
        value = torch.stack([x.value for x in known]).index_select(0, index).squeeze(0)
        return torch.where(found, value, torch.nan)

    def _known(self, key: Tensor) -> list[_Forward]:
        return [x for x in reversed(self._forwards) if x.key.shape == key.shape]

    def _nearest(self, known: list[_Forward], key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position of the forward with this key, of shape (1,), and whether it is."""
        keys = torch.stack([x.key for x in known])
        # Channels that are not finite do not help to identify the batch.
        norm = partial(torch.linalg.vector_norm, dim=-1)
        distance, size = norm(_finite(keys - key)), norm(_finite(key))
        near = distance <= distance.min() + TIED * size
        index = (near * (1 + self._waits(known).int())).argmax().view(1)
        return index, distance[index] <= SAME * size

    def _waits(self, known: list[_Forward]) -> Tensor:
        yes = known[0].key.new_ones((), dtype=torch.bool)
        return torch.stack([yes if x.waits is None else x.waits for x in known])

    def _have_run_again(self, known: list[_Forward], index: Tensor) -> None:
        waits = self._waits(known)
        waits = waits & (ring_buffer.slots(waits) != index)
        for forward, still in zip(known, waits.unbind(), strict=True):
            forward.waits = still

    def same(self, key: Tensor, value: Tensor) -> Tensor:
        """Return the value of this forward, or of the one that it repeats."""
        same: Tensor = opaque(_OPERATOR, _same)(key, value, self.reference)
        return same


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def too_long_ago(remembered: int, remedy: str, *, where: str = "") -> InvalidValueError:
    """Return the error of a forward that runs again, and is not remembered.

    Args:
        remembered: how many of the last forwards are.
        remedy: what to do.
        where: the layer.
    """
    return InvalidValueError(
        f"{where}: " * bool(where) + "a training forward inside a backward pass is taken for one "
        f"that activation checkpointing runs again, but none of the last {remembered} had this "
        f"input: {remedy}"
    )


def _same(key: Tensor, value: Tensor, reference: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # an export: nothing runs again there
        return value
    recall: Recall | None = referred(reference)
    if recall is None:  # a trace that has outlived its layer, in another process for one
        return value
    if in_backward_pass():
        return recall.find(key)
    recall.remember(key, value)
    return value


def _operator(key: Tensor, value: Tensor, reference: Tensor) -> Tensor:
    # Copies: compiled code may reuse the memory, and an operator may not return an argument.
    return _same(key.clone(), value.clone(), reference).clone()


def _shape(key: Tensor, value: Tensor, reference: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(value)


_OPERATOR = register("recall", _operator, _shape)
